"""Loggers, one file NAME_logger.py each: `logger=NAME` also sends the metrics of a run to NAME's library.

`logger.name=[wandb,tensorboard]` uses several. Each file has

    open_run(run: LoggedRun) -> LogWriter

which imports the library, opens the run and returns an object with `log(row)`, `summary(values)` and
`finish(exit_code)` (see `lora_exp/train/logged_run.py`). `BackgroundLogger` calls it in a separate thread, so it may
block or raise without stopping or slowing training. A new logger also needs `conf/logger/NAME.yaml`, and an extra NAME
in pyproject.toml for its library.
"""

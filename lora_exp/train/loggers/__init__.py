"""Loggers, one file NAME_logger.py each: `logger=NAME` also sends the metrics of a run to NAME's library.

`logger.name=[wandb,tensorboard]` uses several. Each file has

    open_run(run: LoggedRun) -> LogWriter

which imports the library, opens the run and returns an object with `log(row)`, `summary(values)` and
`finish(exit_code)` (see `lora_exp/train/logged_run.py`). It is called in a thread of its own by
`BackgroundLogger`, so it may block and raise: neither stops nor slows training. A new logger also needs
`conf/logger/NAME.yaml`, and an extra NAME in pyproject.toml for its library.
"""

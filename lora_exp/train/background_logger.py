"""Loggers as optional views of metrics.jsonl: `make_logger` for a run, `wait_for` at its end.

Each logger runs in a background thread that reads from a bounded queue. If it fails (a missing package, no network, a
full disk, a bug, a server that does not respond), the program shows one warning and training continues at the same
speed.
"""

import hashlib
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_exp.config.schema import LoggerConfig
from lora_exp.runtime import console
from lora_exp.runtime.run_files import METRICS_FILE
from lora_exp.runtime.sweep_directory import sweep_trial
from lora_exp.train.logged_run import LoggedRun, LogWriter
from lora_exp.train.loggers.wandb_logger import wandb_mode

Rows = Sequence[Mapping[str, Any]]


class Logger:
  """The loggers of one run. No method raises, and only `wait` blocks, for a limited time."""

  def __init__(self, parts: Sequence["BackgroundLogger"] = ()):
    self.parts = list(parts)

  def log(self, row: Mapping[str, Any]) -> None:
    """Logs one row of metrics.jsonl."""
    for part in self.parts:
      part.put("log", dict(row))

  def summary(self, values: Mapping[str, Any]) -> None:
    """Logs the content of summary.json."""
    for part in self.parts:
      part.put("summary", dict(values))

  def finish(self, exit_code: int) -> None:
    """Ends the run with its exit code."""
    for part in self.parts:
      part.finish(exit_code)

  def wait(self, until: float) -> None:
    """Waits until everything is written, but no longer than `until`, a time of time.monotonic()."""
    for part in self.parts:
      part.wait(until)


def wait_for(loggers: Sequence[Logger]) -> None:
  """Waits until all loggers have written everything, with one time limit for all of them."""
  until = time.monotonic() + BackgroundLogger.finish_seconds
  for logger in loggers:
    logger.wait(until)


def make_logger(
  cfg: LoggerConfig, run_dir: Path, name: str, config: Mapping[str, Any], earlier_rows: Rows = ()
) -> Logger:
  """The loggers of `cfg`. `name` is the run's name on a dashboard, `config` holds all its settings.

  `earlier_rows` are those of metrics.jsonl before a run was resumed. The trials of a sweep share the directory
  SWEEP/wandb, because `wandb leet` does not search subdirectories.
  """
  names = [logger for logger in cfg.names if logger != "none"]
  mode = wandb_mode(cfg.mode) if "wandb" in names else "offline"
  if mode == "disabled":
    names.remove("wandb")
  if not names:
    return Logger()
  run_dir = Path(run_dir).absolute()
  trial = sweep_trial(run_dir)
  method = str(config["lora"]["method"]) if trial else ""
  name = trial.name(method) if trial else name
  digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
  run = LoggedRun(
    run_dir, trial.sweep if trial else run_dir, name, re.sub(r"[^\w-]+", "-", name)[:100] + "-" + digest, config,
    mode=mode, project=cfg.project, group=cfg.group or (trial.sweep.name if trial else None),
    job_type=method or None, tags=list(cfg.tags), earlier_rows=earlier_rows,
  )  # fmt: skip
  return Logger([BackgroundLogger(logger, run) for logger in names])


class BackgroundLogger:
  """Passes rows to the thread of one logger. No method raises, and only `wait` blocks, for a limited time."""

  finish_seconds = 60.0  # timeout for the import, the queue and the upload; shared by all trials
  queue_rows = 10_000  # capacity of the queue; further rows are dropped

  def __init__(self, name: str, run: LoggedRun):
    self.name, self.run = name, run
    self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(self.queue_rows)
    self.unsent_finish: tuple[str, Any] | None = None  # set if the queue was full when the run finished
    self.warned = False
    self.thread = threading.Thread(target=self._work, name=name, daemon=True)
    self.thread.start()

  def put(self, kind: str, value: dict) -> None:
    """Adds a row or a summary to the queue."""
    if not self.thread.is_alive():  # it failed, and the warning was shown
      return
    try:
      self.queue.put_nowait((kind, value))
    except queue.Full:
      self._warn("rows are dropped because they arrive faster than it can process them")

  def finish(self, exit_code: int) -> None:
    """Adds the end of the run to the queue."""
    self.unsent_finish = ("finish", exit_code)
    with suppress(queue.Full):  # `wait` tries again
      self.queue.put_nowait(self.unsent_finish)
      self.unsent_finish = None

  def wait(self, until: float) -> None:
    """Waits for the thread to end, but no longer than `until`, a time of time.monotonic()."""
    if self.unsent_finish is not None and self.thread.is_alive():
      try:
        self.queue.put(self.unsent_finish, timeout=_seconds_until(until))
      except queue.Full:
        self._warn("the queue is full")
        return
    self.thread.join(_seconds_until(until))
    if self.thread.is_alive():
      self._warn(f"it did not finish within {self.finish_seconds:.0f} s")

  def _warn(self, problem: str) -> None:
    if not self.warned:
      self.warned = True
      console.show_warning(f"{self.name}: {problem}; training continues, and {METRICS_FILE} has every row")

  def _work(self) -> None:
    """The thread's main function."""
    # A broad except, because no error of a logger may end training.
    try:
      open_run: Callable[[LoggedRun, Callable[[str], None]], LogWriter]
      open_run = import_module(f"lora_exp.train.loggers.{self.name}_logger").open_run
      writer = open_run(self.run, self._warn)
      while True:
        kind, value = self.queue.get()
        if kind == "log":
          writer.log(value)
        elif kind == "summary":
          writer.summary(value)
        else:
          return writer.finish(value)
    except ModuleNotFoundError as error:
      return self._warn(f"needs the package {error.name}: pip install 'lora_exp[{self.name}]'")
    except (Exception, SystemExit) as error:
      return self._warn(f"{type(error).__name__}: {error}")


def _seconds_until(until: float) -> float:
  """Seconds until the time `until` of time.monotonic(); at least a millisecond."""
  return max(0.001, until - time.monotonic())

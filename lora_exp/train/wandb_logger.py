"""Logging to Weights & Biases, as an optional view of the metrics in metrics.jsonl.

wandb runs in a background thread that reads from a bounded queue. If it fails (no network, a full disk, a bug, a server
that does not respond), the program shows one warning and training continues at the same speed.
"""

import hashlib
import netrc
import os
import queue
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lora_exp.config.schema import LoggerConfig
from lora_exp.runtime import console
from lora_exp.runtime.run_files import METRICS_FILE
from lora_exp.runtime.sweep_directory import sweep_trial


class Logger:
  """The interface of loggers. This class logs nothing."""

  def log(self, row: dict) -> None:
    """Logs one row of metrics.jsonl."""

  def summary(self, values: dict) -> None:
    """Logs the content of summary.json."""

  def finish(self, exit_code: int) -> None:
    """Ends the run with its exit code."""

  def wait(self, until: float) -> None:
    """Waits until everything is written, but no longer than `until`, a time of time.monotonic()."""


def wait_for(loggers: Sequence[Logger]) -> None:
  """Waits until all loggers have written everything, with one time limit for all of them."""
  until = time.monotonic() + WandbLogger.finish_seconds
  for logger in loggers:
    logger.wait(until)


def make_logger(cfg: LoggerConfig, run_dir: Path, name: str, config: dict) -> Logger:
  """The logger for `cfg`. `name` is the run's name on the dashboard, `config` holds all its settings.

  The trials of a sweep share the directory SWEEP/wandb, because `wandb leet` does not search subdirectories. They form
  a wandb group. A trial is named by its number and the settings that differ between trials.
  """
  mode = wandb_mode(cfg.mode) if cfg.name == "wandb" else "disabled"
  if mode == "disabled":
    return Logger()
  run_dir = Path(run_dir).absolute()
  trial = sweep_trial(run_dir)
  method = str(config["lora"]["method"]) if trial else ""
  name = trial.name(method) if trial else name
  digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]  # a resumed run has the same id
  settings = {
    "mode": mode, "dir": str(trial.sweep if trial else run_dir), "name": name, "config": config,
    "project": cfg.project, "group": cfg.group or (trial.sweep.name if trial else None), "job_type": method or None,
    "tags": list(cfg.tags), "id": re.sub(r"[^\w-]+", "-", name)[:100] + "-" + digest,
    "resume": "allow" if mode == "online" else None,
  }  # fmt: skip
  return WandbLogger(settings)


def wandb_mode(mode: str) -> str:
  """Resolves `mode` to online, offline or disabled.

  `auto` uses WANDB_MODE if it is set; otherwise online if an API key is configured, else offline.
  """
  if mode == "auto":
    mode = os.environ.get("WANDB_MODE", "").lower() or ("online" if _has_key() else "offline")
    return {"run": "online", "dryrun": "offline", "shared": "online"}.get(mode, mode)
  if mode == "online" and not _has_key():  # wandb would prompt for the key and block
    console.show_warning("logger.mode=online needs a key: set WANDB_API_KEY or run `wandb login`; logging offline")
    return "offline"
  return mode


def _has_key() -> bool:
  """Whether an API key is in the environment or in a netrc file."""
  if os.environ.get("WANDB_API_KEY"):
    return True
  host = urlparse(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
  files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
  for file in files:
    try:
      if netrc.netrc(os.path.expanduser(file)).authenticators(host):
        return True
    except (OSError, netrc.NetrcParseError):
      continue
  return False


class WandbLogger(Logger):
  """Passes rows to the wandb thread. No method raises, and only `wait` blocks, for a limited time."""

  init_seconds = 20.0  # timeout for connecting to the server
  finish_seconds = 60.0  # timeout for the import, the queue and the upload; shared by all trials
  queue_rows = 10_000  # capacity of the queue; further rows are dropped

  def __init__(self, settings: dict):
    self.settings = settings
    self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(self.queue_rows)
    self.unsent_finish: tuple[str, Any] | None = None  # set if the queue was full when the run finished
    self.warned = False
    self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
    self.thread.start()

  def log(self, row: dict) -> None:
    self._put("log", dict(row))

  def summary(self, values: dict) -> None:
    self._put("summary", dict(values))

  def finish(self, exit_code: int) -> None:
    self.unsent_finish = ("finish", exit_code)
    with suppress(queue.Full):  # `wait` tries again
      self.queue.put_nowait(self.unsent_finish)
      self.unsent_finish = None

  def wait(self, until: float) -> None:
    if self.unsent_finish is not None and self.thread.is_alive():
      try:
        self.queue.put(self.unsent_finish, timeout=_seconds_until(until))
      except queue.Full:
        self._warn("the queue is full")
        return
    self.thread.join(_seconds_until(until))
    if self.thread.is_alive():
      self._warn(f"it did not finish within {self.finish_seconds:.0f} s")

  def _put(self, kind: str, value: dict) -> None:
    if not self.thread.is_alive():  # it failed, and the warning was shown
      return
    try:
      self.queue.put_nowait((kind, value))
    except queue.Full:
      self._warn("rows are dropped because they arrive faster than it can process them")

  def _warn(self, problem: str) -> None:
    if not self.warned:
      self.warned = True
      console.show_warning(f"wandb: {problem}; training continues, and {METRICS_FILE} has every row")

  def _work(self) -> None:
    """The thread's main function."""
    # A broad except, because no error of wandb may end training.
    try:
      run = self._start()
      while True:
        kind, value = self.queue.get()
        if kind == "log":
          run.log(*_history(value))
        elif kind == "summary":
          run.summary.update(value)
        else:
          return run.finish(exit_code=value)
    except (Exception, SystemExit) as error:
      return self._warn(f"{type(error).__name__}: {error}")

  def _start(self) -> Any:
    """Imports wandb and starts its run: offline if the server cannot be reached."""
    # wandb reads these variables when it is imported. With error reporting, even an offline run looks up a host.
    for name, value in (("WANDB_ERROR_REPORTING", "false"), ("WANDB_SILENT", "true")):
      os.environ.setdefault(name, value)
    import wandb

    quiet = wandb.Settings(
      silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
      x_disable_machine_info=True, reinit="create_new", init_timeout=self.init_seconds,
      finish_timeout=max(1.0, self.finish_seconds - self.init_seconds))
    try:
      run = wandb.init(**self.settings, settings=quiet)
    except wandb.Error as error:
      if self.settings["mode"] != "online":
        raise
      self._warn(f"the server cannot be reached ({error}); logging offline; upload it later with `wandb sync`")
      name = self.settings["id"] + "-offline"  # wandb's service still holds the first id and would not respond
      run = wandb.init(**self.settings | {"mode": "offline", "resume": None, "id": name}, settings=quiet)
    _define_axes(run)
    return run


def _seconds_until(until: float) -> float:
  """Seconds until the time `until` of time.monotonic(); at least a millisecond."""
  return max(0.001, until - time.monotonic())


def _define_axes(run: Any) -> None:
  """Sets the x-axis of each chart: tokens for loss_by_tokens/*, steps for everything else."""
  for axis in ("step", "tokens"):
    run.define_metric(axis, hidden=True)
  for split in ("train", "eval", "retain"):
    run.define_metric(f"{split}/*", step_metric="step")
  run.define_metric("loss_by_tokens/*", step_metric="tokens")


def _history(row: dict) -> tuple[dict, int]:
  """Converts a row of metrics.jsonl to wandb's (values, step), with names such as train/loss, loss_by_tokens/eval."""
  split, step = row.get("split", "train"), row["step"]
  values = {key: value for key, value in row.items() if key in ("step", "tokens")}
  values |= {f"{split}/{key}": value for key, value in row.items() if key not in ("step", "tokens", "split")}
  if "loss" in row and "tokens" in row:
    values[f"loss_by_tokens/{split}"] = row["loss"]
  return values, step

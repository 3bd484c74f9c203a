"""Logging of metrics: to metrics.jsonl, the record of the run, and to wandb, a view of it.

wandb runs in one thread that is fed by a bounded queue. Whatever goes wrong there (no network, no disk, a bug, a server
that does not answer) costs the dashboard and one warning, but neither the run nor its time.
"""

import hashlib
import json
import math
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

from lora_exp.config.errors import DiskError
from lora_exp.config.schema import LoggerConfig
from lora_exp.runtime import console
from lora_exp.runtime.files import write_text_atomically
from lora_exp.runtime.json_lines import parse_lines
from lora_exp.runtime.run_files import METRICS_FILE
from lora_exp.runtime.sweep_directory import sweep_trial


class MetricsFile:
  """Writes metrics.jsonl of a run: one line for each row, flushed as soon as it is logged."""

  def __init__(self, run_dir: Path, last_step: int | None):
    """Starts a new file, or with `last_step` continues the old one after dropping the rows of later steps."""
    self.path = Path(run_dir) / METRICS_FILE
    kept = []
    if last_step is not None and self.path.exists():
      kept = [line for line, row in parse_lines(self.path) if row.get("step", 0) <= last_step]
    try:
      write_text_atomically(self.path, "".join(f"{line}\n" for line in kept), durable=True)
      self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror})") from error

  def log(self, row: dict) -> None:
    """Appends `row`; NaN and infinity become null. Raises DiskError."""
    try:
      self.file.write(json.dumps({key: _plain(value) for key, value in row.items()}) + "\n")
      self.file.flush()
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror}); make room there and resume") from error

  def close(self) -> None:
    self.file.close()


def _plain(value: Any) -> Any:
  """`value` for JSON: numpy and jax scalars as Python numbers, NaN and infinity as None."""
  value = value.item() if hasattr(value, "item") else value
  return None if isinstance(value, float) and not math.isfinite(value) else value


class Logger:
  """The interface of loggers; this one does nothing."""

  def log(self, row: dict) -> None:
    """One row of metrics.jsonl."""

  def summary(self, values: dict) -> None:
    """The content of summary.json."""

  def finish(self, exit_code: int) -> None:
    """Ends the run with its exit code."""

  def wait(self, until: float) -> None:
    """Waits until everything is written, at most until the time `until` (of time.monotonic)."""


def wait_for(loggers: Sequence[Logger]) -> None:
  """Waits until all loggers have written everything, or until a time limit that they share."""
  until = time.monotonic() + WandbLogger.finish_seconds
  for one in loggers:
    one.wait(until)


def make_logger(cfg: LoggerConfig, run_dir: Path, name: str, config: dict) -> Logger:
  """The logger of `cfg`; `config` are all settings of the run, `name` is its name on the dashboard.

  The trials of a sweep share one directory, SWEEP/wandb, because `wandb leet` does not search deeper. They form a
  group, and the name of each is its number and the settings in which it differs.
  """
  mode = wandb_mode(cfg.mode) if cfg.name == "wandb" else "disabled"
  if mode == "disabled":
    return Logger()
  run_dir = Path(run_dir).absolute()
  place = sweep_trial(run_dir)
  method = str(config["lora"]["method"]) if place else ""
  name = place.name(method) if place else name
  digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]  # resumed there, the same run
  settings = {
    "mode": mode, "dir": str(place.sweep if place else run_dir), "name": name, "config": config,
    "project": cfg.project, "group": cfg.group or (place.sweep.name if place else None), "job_type": method or None,
    "tags": list(cfg.tags), "id": re.sub(r"[^\w-]+", "-", name)[:100] + "-" + digest,
    "resume": "allow" if mode == "online" else None,
  }  # fmt: skip
  return WandbLogger(settings)


def wandb_mode(mode: str) -> str:
  """online, offline or disabled; `auto` follows WANDB_MODE, and else whether a key is configured."""
  if mode == "auto":
    mode = os.environ.get("WANDB_MODE", "").lower() or ("online" if _has_key() else "offline")
    return {"run": "online", "dryrun": "offline", "shared": "online"}.get(mode, mode)
  if mode == "online" and not _has_key():  # wandb would ask for the key, with nobody there to type it
    console.show_warning("logger.mode=online needs a key: set WANDB_API_KEY or run `wandb login`; logging offline")
    return "offline"
  return mode


def _has_key() -> bool:
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
  """Passes rows to the thread that owns wandb; never raises, and only `wait` waits, for a limited time."""

  init_seconds = 20.0  # of waiting for the server when the run starts
  finish_seconds = 60.0  # of waiting for the import, the queue and the upload, of all trials together
  queue_rows = 10_000  # rows waiting; more are dropped

  def __init__(self, settings: dict):
    self.settings = settings
    self.queue: queue.Queue[tuple[str, Any]] = queue.Queue(self.queue_rows)
    self.last: tuple[str, Any] | None = None  # what did not fit into the queue
    self.warned = False
    self.thread = threading.Thread(target=self._work, name="wandb", daemon=True)
    self.thread.start()

  def log(self, row: dict) -> None:
    self._put("log", dict(row))

  def summary(self, values: dict) -> None:
    self._put("summary", dict(values))

  def finish(self, exit_code: int) -> None:
    self.last = ("finish", exit_code)
    with suppress(queue.Full):  # `wait` tries again
      self.queue.put_nowait(self.last)
      self.last = None

  def wait(self, until: float) -> None:
    left = lambda: max(0.001, until - time.monotonic())
    if self.last is not None and self.thread.is_alive():
      try:
        self.queue.put(self.last, timeout=left())
      except queue.Full:
        return self._warn("it did not keep up")
    self.thread.join(left())
    if self.thread.is_alive():
      self._warn(f"it did not finish within {self.finish_seconds:.0f} s")
    return None

  def _put(self, kind: str, value: dict) -> None:
    if not self.thread.is_alive():  # it failed, and said so
      return
    try:
      self.queue.put_nowait((kind, value))
    except queue.Full:
      self._warn("rows come faster than it takes them, and are dropped")

  def _warn(self, what: str) -> None:
    if not self.warned:
      self.warned = True
      console.show_warning(f"wandb: {what}; the run goes on, {METRICS_FILE} has every row")

  def _work(self) -> None:
    # The one broad except of the program: a dashboard must not end a training, whatever it raises.
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
    for name, value in (("WANDB_ERROR_REPORTING", "false"), ("WANDB_SILENT", "true")):  # read at the import;
      os.environ.setdefault(name, value)  # without the first an offline run looks up a host
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
      self._warn(f"the server cannot be reached ({error}); logging offline, `wandb sync` sends it later")
      name = self.settings["id"] + "-offline"  # wandb's service still holds the first one and would never answer
      run = wandb.init(**self.settings | {"mode": "offline", "resume": None, "id": name}, settings=quiet)
    _define_axes(run)
    return run


def _define_axes(run: Any) -> None:
  for axis in ("step", "tokens"):
    run.define_metric(axis, hidden=True)
  for split in ("train", "eval", "retain"):
    run.define_metric(f"{split}/*", step_metric="step")
  run.define_metric("loss_by_tokens/*", step_metric="tokens")


def _history(row: dict) -> tuple[dict, int]:
  """A row of metrics.jsonl as wandb's (values, step): train/loss against steps, loss_by_tokens/train against tokens."""
  split, step = row.get("split", "train"), row["step"]
  values = {key: value for key, value in row.items() if key in ("step", "tokens")}
  values |= {f"{split}/{key}": value for key, value in row.items() if key not in ("step", "tokens", "split")}
  if "loss" in row and "tokens" in row:
    values[f"loss_by_tokens/{split}"] = row["loss"]
  return values, step

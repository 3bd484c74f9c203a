"""Weights & Biases: online with an API key, otherwise offline in DIR/wandb."""

import netrc
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lora_exp.runtime import console
from lora_exp.train.logged_run import LoggedRun, loss_by_tokens, named_values

INIT_SECONDS = 20.0  # timeout for connecting to the server
FINISH_SECONDS = 40.0  # timeout for the upload


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


def open_run(run: LoggedRun, warn: Callable[[str], None]) -> "WandbWriter":
  """Imports wandb and starts its run: offline if the server cannot be reached."""
  # wandb reads these variables when it is imported. With error reporting, even an offline run looks up a host.
  for name, value in (("WANDB_ERROR_REPORTING", "false"), ("WANDB_SILENT", "true")):
    os.environ.setdefault(name, value)
  import wandb

  settings: dict[str, Any] = {
    "mode": run.mode, "dir": str(run.directory), "name": run.name, "config": dict(run.config), "project": run.project,
    "group": run.group, "job_type": run.job_type, "tags": list(run.tags), "id": run.id,
    "resume": "allow" if run.mode == "online" else None,
  }  # fmt: skip
  quiet = wandb.Settings(
    silent=True, console="off", disable_git=True, save_code=False, x_disable_stats=True, x_disable_meta=True,
    x_disable_machine_info=True, reinit="create_new", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
  replaced = _offline_directories(run)
  try:
    wandb_run = wandb.init(**settings, settings=quiet)
  except wandb.Error as error:
    if run.mode != "online":
      raise
    warn(f"the server cannot be reached ({error}); logging offline; upload it later with `wandb sync`")
    offline = {"mode": "offline", "resume": None, "id": f"{run.id}-offline"}  # wandb's service still holds the first id
    wandb_run = wandb.init(**settings | offline, settings=quiet)
  _define_axes(wandb_run)
  writer = WandbWriter(wandb_run, replaced if run.mode == "offline" else [])
  if not wandb_run.step:  # a new run, or an offline one, which starts anew
    for row in run.earlier_rows:
      writer.log(row)
  return writer


class WandbWriter:
  """Writes to one run of wandb.

  An offline run that is resumed gets a new file, and `wandb sync` overwrites the rows of one file with those of the
  next. So the new file has the earlier rows too, and `replaced`, the directories of the earlier files, are removed.
  """

  def __init__(self, run: Any, replaced: list[Path]):
    self.run, self.replaced = run, replaced

  def log(self, row: Mapping[str, Any]) -> None:
    axes = {key: value for key, value in row.items() if key in ("step", "tokens")}
    self.run.log(axes | named_values(row) | loss_by_tokens(row), row["step"])

  def summary(self, values: Mapping[str, Any]) -> None:
    self.run.summary.update(dict(values))

  def finish(self, exit_code: int) -> None:
    self.run.finish(exit_code=exit_code)
    for directory in self.replaced:
      shutil.rmtree(directory, ignore_errors=True)


def _offline_directories(run: LoggedRun) -> list[Path]:
  """The directories in which earlier processes logged the resumed run offline."""
  return sorted((run.directory / "wandb").glob(f"offline-run-*-{run.id}"))


def _define_axes(run: Any) -> None:
  """Sets the x-axis of each chart: tokens for loss_by_tokens/*, steps for everything else."""
  for axis in ("step", "tokens"):
    run.define_metric(axis, hidden=True)
  for split in ("train", "eval", "retain"):
    run.define_metric(f"{split}/*", step_metric="step")
  run.define_metric("loss_by_tokens/*", step_metric="tokens")

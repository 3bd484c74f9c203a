"""`task=dashboard run=DIR`: builds a wandb workspace of a sweep or a run, as a file, and online with an API key."""

import json
import os
import shlex
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lora_exp.config import Config, InputError, LoraExpError
from lora_exp.report.wandb_workspace import WorkspaceContents, build_workspace, workspace_contents
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path, typed_path
from lora_exp.train.loggers.wandb_logger import wandb_mode

SPEC = Path("wandb") / "dashboard.json"
SECONDS = 45.0  # timeout of all requests to the server together


def run(cfg: Config) -> None:
  """Writes the workspace of `cfg.run` as JSON, and saves it online if there is an API key."""
  directory = Path(str(cfg.run))
  contents = workspace_contents(directory)
  spec = build_workspace(contents, "")._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
  path = directory / SPEC
  path.parent.mkdir(exist_ok=True)
  content = {"name": contents.name, "project": contents.project, "spec": json.loads(spec)}
  path.write_text(json.dumps(content, indent=2) + "\n")
  console.show(f"Workspace of {contents.name}: {display_path(path)}")
  sync = f"wandb sync {shlex.quote(display_path(contents.home))}/wandb/offline-run-*"
  if wandb_mode(cfg.logger.mode) != "online":
    again = f"python -m lora_exp task=dashboard {typed_path('run', directory)}"
    console.show("The workspace is not saved online, because wandb has no API key or is set to offline. To save it "
                 f"later, set WANDB_API_KEY or run `wandb login`, then\n  {sync}\n  {again}")
    return
  console.show(f"Saved: {_call_within(SECONDS, partial(_save_online, contents))}")
  offline = len(list((contents.home / "wandb").glob("offline-run-*")))
  if offline:
    console.show(f"Runs logged offline ({offline}) are shown there once they are sent: {sync}")


def _save_online(contents: WorkspaceContents) -> str:
  """Saves the workspace in the account of the key and returns its URL."""
  os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
  os.environ.setdefault("WANDB_SILENT", "true")
  import wandb

  entity = os.environ.get("WANDB_ENTITY") or wandb.Api().default_entity
  if not entity:
    raise InputError("wandb: the key has no default account; set WANDB_ENTITY")
  workspace = build_workspace(contents, entity)
  workspace.save()
  return str(workspace.url)


def _call_within(seconds: float, save: Callable[[], str]) -> str:
  """Returns the result of `save`. Raises LoraExpError if it fails or takes longer; wandb itself waits for minutes."""
  results: list[str | Exception] = []

  def call() -> None:
    try:
      results.append(save())
    except Exception as error:  # wandb documents no base class of its errors
      results.append(error)

  thread = threading.Thread(target=call, name="dashboard", daemon=True)
  thread.start()
  thread.join(seconds)
  result = results[0] if results else LoraExpError(f"no answer within {seconds:.0f} s")
  if isinstance(result, InputError):
    raise result
  if isinstance(result, Exception):
    why = " ".join(str(result).split())
    raise LoraExpError(f"wandb: the workspace could not be saved ({why}); it is in {SPEC}; give this command again "
                       "when the server can be reached and has the runs")
  return result

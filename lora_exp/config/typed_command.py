"""Builds the next command for the user from the command line that is running."""

import shlex

from hydra.core.hydra_config import HydraConfig

PROGRAM = ("python", "-m", "lora_exp")


def typed_overrides(task: str) -> list[str]:
  """The overrides of the command line that runs `task`; [] if the task was called from Python."""
  if not HydraConfig.initialized():
    return []
  typed = list(HydraConfig.get().overrides.task)
  return typed if f"task={task}" in typed else []


def training_command(task: str) -> str | None:
  """The command that trains with the settings of the command line that runs `task`; None from Python.

  It leaves out the settings of `task`, and the directory that only `task` writes.
  """
  typed = typed_overrides(task)
  kept = [text for text in typed if text != f"task={task}" and not text.startswith((f"{task}.", "out="))]
  return shlex.join([*PROGRAM, *kept]) if typed else None

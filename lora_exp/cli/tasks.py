"""Tasks are files: `task=NAME` runs the function `run` of `lora_exp/tasks/NAME.py`.

Only training creates a directory, which is passed to its `run`; other tasks work on `cfg.run`.
"""

import pkgutil
from importlib import import_module
from pathlib import Path

from lora_exp import tasks
from lora_exp.config.schema import Config


def task_names() -> list[str]:
  """The files in `lora_exp/tasks`, without importing them."""
  return sorted(module.name for module in pkgutil.iter_modules(tasks.__path__))


def run_task(cfg: Config, run_dir: Path) -> object:
  """Runs `cfg.task` and returns its result. Imports the module, and with it jax, only now."""
  run = import_module(f"lora_exp.tasks.{cfg.task}").run
  return run(cfg, run_dir) if cfg.task == "train" else run(cfg)

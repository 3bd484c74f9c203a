"""Tasks are files: `task=NAME` runs the function `run` of `lora_exp/tasks/NAME.py`.

The file is NAME_task.py where a library is called NAME: a script in the folder would import our file in its place.
Only training creates a directory, which is passed to its `run`; other tasks work on `cfg.run`. The first sentence of a
file's docstring, after the name of the task, describes it in `--help`.
"""

import ast
import pkgutil
import re
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path

from lora_exp import tasks
from lora_exp.config.schema import Config
from lora_exp.runtime.console import phase, status_on_stderr
from lora_exp.runtime.output_stream import tolerant_output

WRITES_TEXT = ("generate", "chat")  # their result is text for standard output; all else goes to standard error


def task_names() -> list[str]:
  """The files in `lora_exp/tasks`, without importing them."""
  return sorted(_modules())


def task_descriptions() -> dict[str, str]:
  """What each task does, by its name: the first sentence of its file's docstring. Imports none of them."""
  modules = _modules()
  return {name: _description(Path(tasks.__path__[0], f"{modules[name]}.py")) for name in sorted(modules)}


def _modules() -> dict[str, str]:
  """The module of each task in `lora_exp/tasks`, by the name of the task."""
  names = [module.name for module in pkgutil.iter_modules(tasks.__path__)]
  return {name.removesuffix("_task"): name for name in names}


def _description(file: Path) -> str:
  docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
  paragraph = " ".join(docstring.split("\n\n")[0].split())
  return re.split(r"\.\s", re.sub(r"^`task=[^`]*`: ", "", paragraph))[0].rstrip(".")


def run_task(cfg: Config, run_dir: Path) -> object:
  """Runs `cfg.task` and returns its result. Imports the module, and with it jax, only now."""
  with ExitStack() as stack:
    stack.enter_context(tolerant_output())
    if cfg.task in WRITES_TEXT:
      stack.enter_context(status_on_stderr())
    with phase("load the program"):
      run = import_module(f"lora_exp.tasks.{_modules()[cfg.task]}").run
    return run(cfg, run_dir) if cfg.task == "train" else run(cfg)

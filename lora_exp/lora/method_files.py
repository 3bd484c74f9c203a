"""The files of the fine-tuning methods, which give `lora.method` its values. No jax."""

import pkgutil
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).parent / "methods"
OTHER_FILES = ("base", "rank_allocation")  # the interface of a method, and the optimizer of AdaLoRA


def method_names(folders: Iterable[str] = (str(FOLDER),)) -> tuple[str, ...]:
  """Returns the names of all methods in alphabetical order: the files of `folders` except OTHER_FILES."""
  return tuple(sorted(file.name for file in pkgutil.iter_modules(folders) if file.name not in OTHER_FILES))

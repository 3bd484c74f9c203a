"""Fine-tuning methods, one file each. To add a method, add a file here and a YAML file in conf/lora; nothing else."""

import pkgutil
from functools import cache
from importlib import import_module
from pathlib import Path

from lora_exp.config import InputError, LoraConfig, did_you_mean
from lora_exp.lora.methods.base import Array, Factors, InitSettings, Leaf, Leaves, Method, Modules, per_kernel

__all__ = [
  "Array",
  "Factors",
  "InitSettings",
  "Leaf",
  "Leaves",
  "Method",
  "Modules",
  "every",
  "get",
  "names",
  "of",
  "per_kernel",
]


@cache
def names() -> tuple[str, ...]:
  """The name of every method: the files of this folder, `base` left out."""
  files = pkgutil.iter_modules([str(Path(__file__).parent)])
  return tuple(sorted(file.name for file in files if file.name != "base"))


@cache
def get(name: str) -> Method:
  """The method that the file `name` of this folder defines. Raises InputError with the nearest name if there is none."""
  if name not in names():
    raise InputError(f"lora.method={name}: choose {', '.join(names())}{did_you_mean(name, names())}")
  module = import_module(f"{__name__}.{name}")
  defined = [x for x in vars(module).values() if isinstance(x, type) and issubclass(x, Method)]
  for kind in defined:
    if kind.__module__ == module.__name__ and kind.name == name:
      return kind()
  raise TypeError(f"{module.__file__} defines no subclass of Method with name = {name!r}")


def every() -> tuple[Method, ...]:
  """All methods, by name."""
  return tuple(get(name) for name in names())


def of(config: LoraConfig) -> Method:
  """The method of these settings: that of lora.method, or of lora.init where that names one (PiSSA, OLoRA)."""
  return variant(config.method, config.init)


def variant(method: str, init: str) -> Method:
  """The method typed as lora.method=`method` lora.init=`init`. Raises InputError where these do not go together."""
  if init not in names() or get(init).init_of is None:
    return get(method)
  chosen = get(init)
  if method not in (chosen.init_of, chosen.name):
    raise InputError(f"lora.init={init}: goes with lora.method={chosen.init_of} alone, not with {method}")
  return chosen

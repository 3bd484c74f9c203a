"""The registry of model families: every file `families/NAME.py` defines one object FAMILY."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache

from lora_exp.config.errors import InputError, did_you_mean, nearest
from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models import families
from lora_exp.models.config_table import OPTIONS
from lora_exp.models.family import Family

TYPING_ERROR = 0.8  # similarity of a misspelt name; high, because names of different models are similar too


@cache
def all_families() -> Mapping[str, Family]:
  """All families by name, in alphabetical order. Raises ValueError if a FAMILY's name differs from its file name."""
  by_name = {}
  for file in sorted(module.name for module in pkgutil.iter_modules(families.__path__)):
    family: Family = importlib.import_module(f"{families.__name__}.{file}").FAMILY
    if family.name != file:
      raise ValueError(f"models/families/{file}.py: FAMILY.name is {family.name!r}; give the file and it one name")
    by_name[file] = family
  return by_name


def get_family(name: str) -> Family:
  """The family `name`. Raises InputError with the existing names if there is none."""
  known = all_families()
  if name not in known:
    raise InputError(f"model.family={name}: choose {', '.join(known)}{did_you_mean(name, known, TYPING_ERROR)}")
  return known[name]


def model_problems(model: ModelConfig) -> list[str]:
  """Problems of `model` with its family: an unknown name or option, or incompatible sizes."""
  try:
    family = get_family(model.family)
  except InputError as error:
    return error.problems
  return [*family.check(model), *_option_problems(model, family)]


def _option_problems(model: ModelConfig, family: Family) -> Iterator[str]:
  """A problem for each entry of `model.arch.options` that the family does not have."""
  options = (model.arch.options if model.arch else None) or {}
  known = family.options()
  for name in options:
    if name not in known:
      choices = f"its options are {', '.join(known)}{did_you_mean(name, known)}" if known else "it has no options"
      yield f"model.{OPTIONS}{name}: no such setting of model.family={family.name}; {choices}{_arch_setting(name)}"


def _arch_setting(name: str) -> str:
  """'; did you mean model.arch.X?' for an option whose name is near to a setting of every family, or ''."""
  near = nearest(name, [field.name for field in fields(ArchConfig)])
  return f"; did you mean model.arch.{near[0]}?" if near else ""

"""The registry of model families: every file `families/NAME.py` defines one object FAMILY."""

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import ModelConfig
from lora_exp.models import families
from lora_exp.models.family import Family


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
    raise InputError(f"model.family={name}: choose {', '.join(known)}{did_you_mean(name, known)}")
  return known[name]


def model_problems(model: ModelConfig) -> list[str]:
  """Problems of `model` with its family: an unknown name, or incompatible sizes."""
  try:
    return list(get_family(model.family).check(model))
  except InputError as error:
    return error.problems

"""The families by name, found in the folder `families`: a file `families/NAME.py` holds one object FAMILY."""

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
  """Every family by its name, in alphabetical order. Raises ValueError for a file whose FAMILY has another name."""
  by_name = {}
  for file in sorted(module.name for module in pkgutil.iter_modules(families.__path__)):
    family: Family = importlib.import_module(f"{families.__name__}.{file}").FAMILY
    if family.name != file:
      raise ValueError(f"models/families/{file}.py: FAMILY.name is {family.name!r}; give the file and it one name")
    by_name[file] = family
  return by_name


def get_family(name: str) -> Family:
  """The family called `name` in `model.family`. Raises InputError with the names there are."""
  known = all_families()
  if name not in known:
    raise InputError(f"model.family={name}: choose {', '.join(known)}{did_you_mean(name, known)}")
  return known[name]


def model_problems(model: ModelConfig) -> list[str]:
  """What the family of `model` cannot compute: an unknown name, or sizes that do not fit each other."""
  try:
    return list(get_family(model.family).check(model))
  except InputError as error:
    return error.problems

"""Conversion of plain values to `Config`. All unknown settings and values of a wrong type are reported at once."""

import math
import re
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.config.errors import InputError
from lora_exp.config.old_names import rename_settings
from lora_exp.config.resolvers import register_resolvers
from lora_exp.config.schema import Config, DataConfig
from lora_exp.config.seeds import with_seeds
from lora_exp.config.setting_names import suggestion

register_resolvers()
TYPE_WORDS = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", Any: "a value"}


def to_config(values: DictConfig | dict[str, Any]) -> Config:
  """Converts nested values to a typed config; missing settings have their defaults.

  Raises InputError with every unknown setting (and its nearest spelling) and every value of a wrong type.
  """
  plain = plain_values(values) if isinstance(values, DictConfig) else values
  converter = TypeConverter()
  config = converter.to_dataclass(Config, with_seeds(rename_settings(plain)), "")
  if converter.problems:
    raise InputError(converter.problems)
  if config.model.weights is not None and config.model.base == "pretrain":
    config.model.base = "weights"  # model.weights=DIR is enough; model.base=random makes a base of the same shape
  return config


def plain_values(cfg: DictConfig) -> dict[str, Any]:
  """Converts a composed config to nested dicts, without Hydra's node and with every interpolation resolved.

  Raises InputError for an interpolation of a missing setting.
  """
  try:
    container = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(container, dict)
    return {str(key): _resolved(cfg, str(key)) for key in container if key != "hydra"}
  except OmegaConfBaseException as error:
    message = str(error).splitlines()[0]
    missing = re.search(r"Interpolation key '(\w+)\.[\w.]+' not found", message)
    advice = f"; a file of the group {missing[1]} inherits its settings with defaults: [NAME]" if missing else ""
    raise InputError(f"{error.full_key or 'config'}: {message}{advice}") from error


def _resolved(cfg: DictConfig, key: str) -> Any:
  value = cfg[key]
  return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


class TypeConverter:
  """Converts values to the types of the dataclasses; adds values that cannot be converted to `problems`."""

  def __init__(self) -> None:
    self.problems: list[str] = []

  def to_dataclass(self, cls: Any, values: Any, path: str) -> Any:
    """Converts `values` to `cls`, the group of settings at `path`."""
    if not isinstance(values, dict):
      self._refuse(path, values, f"a group of settings ({', '.join(f.name for f in fields(cls)[:3])}, ...)")
      return cls()
    prefix = f"{path}." if path else ""
    hints = get_type_hints(cls)
    for key in values:
      if key not in hints:
        self.problems.append(f"{prefix}{key}: no such setting{suggestion(f'{prefix}{key}')}")
    return cls(**{key: self.convert(hint, values[key], prefix + key) for key, hint in hints.items() if key in values})

  def convert(self, hint: Any, value: Any, path: str) -> Any:
    """Converts `value` to the type `hint` without rounding: 1.5 is not an int, and true is not a number."""
    if hint is Any:
      return value
    if get_origin(hint) in (Union, types.UnionType):
      hint = next(t for t in get_args(hint) if t is not type(None))
      if value is None or (value == {} and is_dataclass(hint)):  # an empty group: data@retain=none
        return None
    if is_dataclass(hint):
      if value == {} and hint is DataConfig:
        self.problems.append(f"{path}=none: no data is only for data@retain and data@pretrain_data; "
                             "choose another, such as data=stdlib_docs")
        return hint()
      return self.to_dataclass(hint, value, path)
    if get_origin(hint) is list:
      return self._to_list(get_args(hint)[-1], value, path)
    if get_origin(hint) is dict:
      return self._to_dict(get_args(hint)[-1], value, path)
    return self._to_scalar(hint, value, path)

  def _to_list(self, item: Any, value: Any, path: str) -> list[Any]:
    if isinstance(value, list):
      return [self._to_scalar(item, element, f"{path}[{i}]") for i, element in enumerate(value)]
    self._refuse(path, value, f"[{TYPE_WORDS[item]}, ...]")
    return []

  def _to_dict(self, item: Any, value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict):
      return {str(key): self.convert(item, element, f"{path}.{key}") for key, element in value.items()}
    key = "pattern" if path.endswith("_pattern") else "name"
    self._refuse(path, value, f"{{{key}: {TYPE_WORDS[item]}}}")
    return {}

  def _to_scalar(self, hint: type, value: Any, path: str) -> Any:
    if isinstance(value, str) and hint in (int, float):
      value = _parse_number(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, float) and not math.isfinite(value):
      self._refuse(path, value, "a finite number")
    elif hint is float and is_number:
      return float(value)
    elif hint is int and is_number and value == int(value):
      return int(value)
    elif hint is str and isinstance(value, int) and not isinstance(value, bool):
      return str(value)  # name=2024
    elif type(value) is hint:
      return value
    else:
      quotes = f""", as '{path}="{shown(value)}"'""" if hint is str and isinstance(value, float | bool) else ""
      self._refuse(path, value, TYPE_WORDS[hint] + quotes)
    return hint()

  def _refuse(self, path: str, value: Any, allowed: str) -> None:
    self.problems.append(f"{path}={shown(value)}: must be {allowed}")


def _parse_number(text: str) -> float | str:
  """Returns `text` as a float if possible (YAML reads 1e-3 as a string), else `text`."""
  try:
    return float(text)
  except ValueError:
    return text


def shown(value: Any) -> str:
  """`value` in the syntax of the command line, shortened to 60 characters."""
  words = {None: "null", True: "true", False: "false"}
  text = words[value] if value is None or isinstance(value, bool) else str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."

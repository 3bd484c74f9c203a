"""The table that maps a published config.json to our settings and back: one row per field, and rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.config.schema import ModelConfig

Settings = dict[str, Any]  # our settings by path below `model`: "layers", "arch.kv_heads"
OPTIONS = "arch.options."  # before the names of settings that one family alone has
ACTIVATIONS = {  # transformers' name -> ours
  "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
  "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}  # fmt: skip
REQUIRED = object()  # the default of a field that must be in the file
LARGEST_COUNTS = {"num_hidden_layers": 10_000, "n_layer": 10_000}
LARGEST_COUNT = 10**9  # maximum of any other size


@dataclass
class ConfigFile:
  """A config.json being read: typed look-ups with defaults, which collect errors in `problems`."""

  values: Mapping[str, Any]
  defaults: Mapping[str, Any] = field(default_factory=dict)
  problems: list[str] = field(default_factory=list)

  def get(self, name: str) -> Any:
    """The field, or its default if it is missing; null is a value."""
    value = self.values.get(name, self.defaults.get(name))
    if value is REQUIRED:
      self.problems.append(f"{name} is missing")
      return None
    return value

  def count(self, name: str, null: int | None = None) -> int:
    """Reads an integer of at least 1. A null is replaced by `null`, if that is given."""
    value = self.get(name)
    if value is None and null is not None:
      return null
    largest = LARGEST_COUNTS.get(name, LARGEST_COUNT)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest:
      return value
    if name in self.values:
      self.problems.append(f"{name}={quoted(value)}: must be a whole number from 1 to {largest:,}")
    return 1

  def number(self, name: str) -> float | None:
    """Reads a positive number, or None for null."""
    value = self.get(name)
    if value is None:
      return None
    if is_positive(value):
      return float(value)
    self.problems.append(f"{name}={quoted(value)}: must be a number above 0")
    return None

  def numbers(self, name: str, length: int) -> list[float]:
    """Reads a list of `length` positive numbers."""
    value = self.get(name)
    if isinstance(value, list) and len(value) == length and all(map(is_positive, value)):
      return [float(x) for x in value]
    if name in self.values:
      self.problems.append(f"{name}={quoted(value)}: must be a list of {length} numbers above 0")
    return [1.0] * length

  def flag(self, name: str) -> bool:
    """Reads a boolean; null is false."""
    value = self.get(name)
    if value not in (None, True, False):
      self.problems.append(f"{name}={quoted(value)}: must be true or false")
    return value is True

  def activation(self, name: str, value: Any) -> str:
    """Our name for the activation `value`."""
    if isinstance(value, str) and value in ACTIVATIONS:
      return ACTIVATIONS[value]
    self.refuse(name, f"choose {', '.join(sorted(ACTIVATIONS))}")
    return "silu"

  def mapping(self, name: str) -> dict[str, Any]:
    """Reads a mapping; null is an empty one."""
    value = self.get(name)
    if value is None or isinstance(value, dict):
      return value or {}
    self.problems.append(f"{name}={quoted(value)}: must be a mapping")
    return {}

  def refuse(self, name: str, supported: str) -> None:
    """Adds the problem that the value of `name` is not supported."""
    self.problems.append(f"{name}={shortened(self.values.get(name))}: not supported; {supported}")


def is_positive(value: Any) -> bool:
  """Whether `value` is a number from above 0 to 1e300."""
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e300


def quoted(value: Any) -> str:
  """`value` as text of at most 60 characters, with quotes around a string, which may look like a number."""
  return f'"{shortened(value)}"' if isinstance(value, str) else shortened(value)


def shortened(value: Any) -> str:
  """`value` as text of at most 60 characters."""
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class ConfigField:
  """A row of the table: our setting and its field in config.json."""

  ours: str  # "layers", "arch.kv_heads"; "arch.options.NAME" for a setting of one family only
  theirs: str

  def read(self, file: ConfigFile, settings: Settings) -> Any:
    """Reads our value from the file; `settings` has the values of earlier rows."""
    raise NotImplementedError

  def write(self, value: Any) -> Any:
    """Converts our setting to the file's value. Raises InputError if there is none."""
    return value


@dataclass(frozen=True)
class Count(ConfigField):
  """An integer of at least 1; `null` computes the value of a null."""

  null: Callable[[Settings], int] | None = None

  def read(self, file: ConfigFile, settings: Settings) -> int:
    return file.count(self.theirs, self.null(settings) if self.null else None)


@dataclass(frozen=True)
class Number(ConfigField):
  """A positive number or null; `whole` if transformers accepts only integers."""

  whole: bool = False
  null: float | None = None  # the value of a null

  def read(self, file: ConfigFile, settings: Settings) -> float | None:
    value = file.number(self.theirs)
    return self.null if value is None else value

  def write(self, value: float | None) -> float | int | None:
    return whole_number(value) if self.whole else value


@dataclass(frozen=True)
class Flag(ConfigField):
  """A boolean."""

  def read(self, file: ConfigFile, settings: Settings) -> bool:
    return file.flag(self.theirs)


@dataclass(frozen=True)
class Activation(ConfigField):
  """The activation of the feed-forward."""

  gelu_tanh: str = "gelu_pytorch_tanh"  # the name to write; transformers has several

  def read(self, file: ConfigFile, settings: Settings) -> str:
    return file.activation(self.theirs, file.get(self.theirs))

  def write(self, value: str) -> str:
    return self.gelu_tanh if value == "gelu_tanh" else value


@dataclass(frozen=True)
class ConfigRule:
  """Converts settings that depend on several fields, in both directions."""

  read: Callable[[ConfigFile, Settings], None]  # adds to the settings, which contain all rows
  write: Callable[[ModelConfig], dict[str, Any]]  # the fields of config.json


def whole_number(value: float | None) -> int | None:
  """`value` as an int. Raises InputError for a fraction."""
  if value is not None and value != int(value):
    raise InputError(f"{value} is not a whole number")
  return None if value is None else int(value)


@dataclass(frozen=True)
class PublishedConfig:
  """The config.json of one model class of transformers."""

  model_type: str  # the field of config.json
  architecture: str  # class name in the field `architectures`
  fields: tuple[ConfigField, ...]
  defaults: Mapping[str, Any]  # the class's defaults for missing fields, or REQUIRED
  fixed: Mapping[str, Any] = field(default_factory=dict)  # settings common to all its models
  rules: tuple[ConfigRule, ...] = ()  # applied after the rows, in this order
  supported: Mapping[str, Any] = field(default_factory=dict)  # fields with a single supported value
  wrappers: Mapping[str, str] = field(default_factory=dict)  # model_type -> class that contains it as `text_config`

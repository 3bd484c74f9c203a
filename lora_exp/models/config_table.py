"""The table that maps a published config.json to our settings and back: a row for each field, rules for the rest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.config.schema import ModelConfig

Settings = dict[str, Any]  # our settings by their path below `model`: "layers", "arch.kv_heads"
ACTIVATIONS = {  # transformers' name -> ours
  "silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu",
  "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh",
}  # fmt: skip
REQUIRED = object()  # the default of a field that must be in the file
LARGEST_COUNTS = {"num_hidden_layers": 10_000, "n_layer": 10_000}
LARGEST_COUNT = 10**9  # of any other size


@dataclass
class ConfigFile:
  """A config.json while it is read: typed look-ups with defaults, which collect what is wrong in `problems`."""

  values: Mapping[str, Any]
  defaults: Mapping[str, Any] = field(default_factory=dict)
  problems: list[str] = field(default_factory=list)

  def get(self, name: str) -> Any:
    """The field, or its default where it is absent; null is a value."""
    value = self.values.get(name, self.defaults.get(name))
    if value is REQUIRED:
      self.problems.append(f"{name} is missing")
      return None
    return value

  def count(self, name: str, null: int | None = None) -> int:
    """A whole number of at least 1; `null` is what the value null stands for, if it is allowed."""
    value = self.get(name)
    if value is None and null is not None:
      return null
    largest = LARGEST_COUNTS.get(name, LARGEST_COUNT)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= largest:
      return value
    if name in self.values:
      self.problems.append(f"{name}={shortened(value)}: must be a whole number from 1 to {largest:,}")
    return 1

  def number(self, name: str) -> float | None:
    """A positive number, or None for null."""
    value = self.get(name)
    if value is None:
      return None
    if is_positive(value):
      return float(value)
    self.problems.append(f"{name}={shortened(value)}: must be a number above 0")
    return None

  def numbers(self, name: str, length: int) -> list[float]:
    """A list of `length` positive numbers."""
    value = self.get(name)
    if isinstance(value, list) and len(value) == length and all(map(is_positive, value)):
      return [float(x) for x in value]
    if name in self.values:
      self.problems.append(f"{name}={shortened(value)}: must be a list of {length} numbers above 0")
    return [1.0] * length

  def flag(self, name: str) -> bool:
    """True or false; null is false."""
    value = self.get(name)
    if value not in (None, True, False):
      self.problems.append(f"{name}={shortened(value)}: must be true or false")
    return value is True

  def activation(self, name: str, value: Any) -> str:
    """Our name of the activation `value`."""
    if isinstance(value, str) and value in ACTIVATIONS:
      return ACTIVATIONS[value]
    self.refuse(name, f"choose {', '.join(sorted(ACTIVATIONS))}")
    return "silu"

  def mapping(self, name: str) -> dict[str, Any]:
    """A mapping; null is an empty one."""
    value = self.get(name)
    if value is None or isinstance(value, dict):
      return value or {}
    self.problems.append(f"{name}={shortened(value)}: must be a mapping")
    return {}

  def refuse(self, name: str, supported: str) -> None:
    """Notes that the value of `name` is not supported."""
    self.problems.append(f"{name}={shortened(self.values.get(name))}: not supported; {supported}")


def is_positive(value: Any) -> bool:
  """Whether `value` is a number from above 0 to 1e300."""
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e300


def shortened(value: Any) -> str:
  """`value` in at most 60 characters."""
  text = str(value)
  return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class ConfigField:
  """A row of the table: our setting and the field of config.json that holds it."""

  ours: str  # "layers", "arch.kv_heads"; a setting that only one family has is "arch.options.NAME"
  theirs: str

  def read(self, file: ConfigFile, settings: Settings) -> Any:
    """Our value of the field; `settings` holds the rows before this one."""
    raise NotImplementedError

  def write(self, value: Any) -> Any:
    """Their value of our setting. Raises InputError if they have none."""
    return value


@dataclass(frozen=True)
class Count(ConfigField):
  """A whole number of at least 1; `null` computes what null stands for."""

  null: Callable[[Settings], int] | None = None

  def read(self, file: ConfigFile, settings: Settings) -> int:
    return file.count(self.theirs, self.null(settings) if self.null else None)


@dataclass(frozen=True)
class Number(ConfigField):
  """A positive number or null; `whole` if transformers takes whole numbers only."""

  whole: bool = False
  null: float | None = None  # what null stands for

  def read(self, file: ConfigFile, settings: Settings) -> float | None:
    value = file.number(self.theirs)
    return self.null if value is None else value

  def write(self, value: float | None) -> float | int | None:
    return whole_number(value) if self.whole else value


@dataclass(frozen=True)
class Flag(ConfigField):
  """True or false."""

  def read(self, file: ConfigFile, settings: Settings) -> bool:
    return file.flag(self.theirs)


@dataclass(frozen=True)
class Activation(ConfigField):
  """The activation of the feed-forward."""

  gelu_tanh: str = "gelu_pytorch_tanh"  # which of its names is written

  def read(self, file: ConfigFile, settings: Settings) -> str:
    return file.activation(self.theirs, file.get(self.theirs))

  def write(self, value: str) -> str:
    return self.gelu_tanh if value == "gelu_tanh" else value


@dataclass(frozen=True)
class ConfigRule:
  """What a row cannot say: settings that depend on several fields, in both directions."""

  read: Callable[[ConfigFile, Settings], None]  # adds to the settings, which hold all rows
  write: Callable[[ModelConfig], dict[str, Any]]  # the fields of config.json


def whole_number(value: float | None) -> int | None:
  """`value` as an int. Raises InputError for a fraction."""
  if value is not None and value != int(value):
    raise InputError(f"{value} is not a whole number")
  return None if value is None else int(value)


@dataclass(frozen=True)
class PublishedConfig:
  """How one class of transformers is configured."""

  model_type: str  # of config.json
  architecture: str  # transformers' class, as config.json's `architectures` names it
  fields: tuple[ConfigField, ...]
  defaults: Mapping[str, Any]  # of that class for fields that the file omits, or REQUIRED
  fixed: Mapping[str, Any] = field(default_factory=dict)  # settings that all of its models have
  rules: tuple[ConfigRule, ...] = ()  # applied after the rows, in this order
  supported: Mapping[str, Any] = field(default_factory=dict)  # fields of which one value is supported
  wrappers: Mapping[str, str] = field(default_factory=dict)  # model_type -> class that holds it as `text_config`

"""Conversion of settings that depend on several fields of config.json: windows, head groups."""

from typing import Any

from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.config_table import ConfigFile, ConfigRule, Settings

FULL, SLIDING = "full_attention", "sliding_attention"  # values in `layer_types`

def arch_of(model: ModelConfig) -> ArchConfig:
  """The architecture of `model`, or the default one."""
  return model.arch or ArchConfig()


def no_fields(model: ModelConfig) -> dict[str, Any]:
  """Writes no fields, because the rows of the table cover them."""
  return {}


# Heads


def all_heads(settings: Settings) -> int:
  """The default number of key/value heads: the number of query heads."""
  heads: int = settings["heads"]
  return heads


def width_by_heads(settings: Settings) -> int:
  """The default head size: width // heads, at least 1."""
  return max(1, settings["width"] // settings["heads"])


def _check_groups(file: ConfigFile, settings: Settings) -> None:
  heads, kv_heads = settings["heads"], settings["arch.kv_heads"]
  if heads % kv_heads:
    file.problems.append(f"num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")


HEAD_GROUPS = ConfigRule(_check_groups, no_fields)  # key/value heads divide the query heads


# Windows


def layer_kinds(file: ConfigFile, layers: int) -> list[str]:
  """FULL or SLIDING for each layer, from `layer_types`; [] if the file does not have it."""
  kinds = file.get("layer_types")
  if kinds is None or (isinstance(kinds, list) and len(kinds) == layers and all(k in (FULL, SLIDING) for k in kinds)):
    return kinds or []
  file.refuse("layer_types", f"must be {FULL} or {SLIDING} for each of num_hidden_layers={layers}")
  return []


def set_windows(file: ConfigFile, settings: Settings, kinds: list[str]) -> None:
  """Sets `window` and `full_layers` from the type of each layer."""
  window = file.count("sliding_window", null=0)
  if window and SLIDING in kinds:
    settings["arch.window"] = window
    settings["arch.full_layers"] = [i for i, kind in enumerate(kinds) if kind == FULL] or None


def written_kinds(model: ModelConfig) -> list[str]:
  """The `layer_types` of the model."""
  arch = arch_of(model)
  full = range(model.layers) if arch.window is None else arch.full_layers or ()
  return [FULL if i in full else SLIDING for i in range(model.layers)]


def _read_one_window(file: ConfigFile, settings: Settings) -> None:
  window = file.count("sliding_window", null=0)
  if window and any(kind != SLIDING for kind in layer_kinds(file, settings["layers"])):
    file.refuse("layer_types", "all layers of this class have the window")
  settings["arch.window"] = window or None


def _write_one_window(model: ModelConfig) -> dict[str, Any]:
  return {"sliding_window": arch_of(model).window}


WINDOW = ConfigRule(_read_one_window, _write_one_window)  # the same window in all layers, or none

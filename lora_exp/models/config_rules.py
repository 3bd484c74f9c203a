"""Conversion of settings that depend on several fields of config.json: rotary embeddings, windows, head groups."""

import math
from collections.abc import Mapping
from typing import Any

from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.config_table import REQUIRED, ConfigFile, ConfigRule, Settings, shortened, whole_number

FULL, SLIDING = "full_attention", "sliding_attention"  # values in `layer_types`
LENGTH = "original_max_position_embeddings"
SCALING_FIELDS = {  # rope_type -> its fields
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
}


def arch_of(model: ModelConfig) -> ArchConfig:
  """The architecture of `model`, or the default one."""
  return model.arch or ArchConfig()


def no_fields(model: ModelConfig) -> dict[str, Any]:
  """Writes no fields, because the rows of the table cover them."""
  return {}


# Heads


def all_heads(settings: Settings) -> int:
  """The default number of key/value heads: that of the query heads."""
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


# Rotations


def rotation_fields(file: ConfigFile) -> dict[str, Any]:
  """The fields of the rotary embedding of all layers, in the layout of transformers 4 or 5."""
  given = file.mapping("rope_scaling") or file.mapping("rope_parameters")
  if FULL in given or SLIDING in given:
    file.refuse("rope_parameters", "supported: one rotation for all layers, {rope_type, rope_theta, ...}")
    given = {}
  given = {"rope_theta": file.values.get("rope_theta", 1e4), **given}
  if "partial_rotary_factor" in file.values:
    given.setdefault("partial_rotary_factor", file.values["partial_rotary_factor"])
  return given


def rotation_kind(given: Mapping[str, Any]) -> str:
  """The rope_type, under its current or former key."""
  return str(given.get("rope_type", given.get("type", "default")))


def read_rotation(file: ConfigFile, given: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
  """Reads (theta, scaling or None) of a rotary embedding over whole heads."""
  kind = rotation_kind(given)
  part = given.get("partial_rotary_factor")
  if part not in (None, 1):
    file.problems.append(f"partial_rotary_factor={shortened(part)}: not supported; supported: 1")
  inner = ConfigFile(given, {"rope_theta": 1e4, **dict.fromkeys(SCALING_FIELDS.get(kind, ()), REQUIRED)})
  if kind == "llama3":
    inner.defaults = {**inner.defaults, LENGTH: file.get("max_position_embeddings")}
  theta = inner.number("rope_theta") or 1e4
  scaling = None
  if kind in SCALING_FIELDS:
    scaling = {"rope_type": kind, **{name: inner.number(name) for name in SCALING_FIELDS[kind]}}
  elif kind != "default":
    inner.problems.append(f"rope_type={shortened(kind)}: not supported; choose default, {', '.join(SCALING_FIELDS)}")
  file.problems += [f"rope_scaling.{problem}" if kind != "default" else problem for problem in inner.problems]
  return theta, scaling


def _read_one_rotation(file: ConfigFile, settings: Settings) -> None:
  settings["arch.rope_theta"], settings["arch.rope_scaling"] = read_rotation(file, rotation_fields(file))


def write_rotation(model: ModelConfig) -> dict[str, Any]:
  """Writes rope_theta and rope_scaling in the layout of transformers 4, which version 5 reads too."""
  arch, scaling = arch_of(model), arch_of(model).rope_scaling
  if scaling and LENGTH in scaling:
    scaling = scaling | {LENGTH: whole_number(scaling[LENGTH])}
  return {"rope_theta": arch.rope_theta, "rope_scaling": scaling}


ROTATION = ConfigRule(_read_one_rotation, write_rotation)  # one rotary embedding for all layers


def longrope_attention_factor(longest: int, original: float, factor: float | None) -> float:
  """The factor of cosines and sines in LongRoPE (arXiv 2402.13753, section 3.4), computed from the lengths."""
  stretch = factor if factor is not None else longest / original
  return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))


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

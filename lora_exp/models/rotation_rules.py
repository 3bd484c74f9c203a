"""Reads and writes the rotary embedding of config.json, in the layouts of transformers 4 and 5."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.config_rules import FULL, SLIDING, arch_of
from lora_exp.models.config_table import REQUIRED, ConfigFile, ConfigRule, Settings, shortened, whole_number

LENGTH = "original_max_position_embeddings"
# Kinds for which transformers prefers the original length outside `rope_scaling` to the one inside.
OUTER_LENGTH_FIRST = ("llama3", "yarn", "longrope")
Scaling = dict[str, Any]


def rotation_fields(file: ConfigFile) -> dict[str, Any]:
  """The fields of the rotary embedding of all layers, in the layout of transformers 4 or 5."""
  given = file.mapping("rope_scaling") or file.mapping("rope_parameters")
  if FULL in given or SLIDING in given:
    file.refuse("rope_parameters", "supported: one rotation for all layers, {rope_type, rope_theta, ...}")
    given = {}
  given = {"rope_theta": file.values.get("rope_theta", file.defaults.get("rope_theta", 1e4)), **given}
  if "partial_rotary_factor" in file.values:
    given.setdefault("partial_rotary_factor", file.values["partial_rotary_factor"])
  if rotation_kind(given) in OUTER_LENGTH_FIRST and file.values.get(LENGTH) is not None:
    given[LENGTH] = file.values[LENGTH]
  return given


def rotation_kind(given: Mapping[str, Any]) -> str:
  """The rope_type, under its current or former key."""
  return str(given.get("rope_type", given.get("type", "default")))


def read_rotation(file: ConfigFile, given: Mapping[str, Any], settings: Settings) -> tuple[float, Scaling | None]:
  """Reads (theta, scaling or None) of a rotary embedding over whole heads from its fields `given`."""
  part = given.get("partial_rotary_factor")
  if part not in (None, 1):
    file.problems.append(f"partial_rotary_factor={shortened(part)}: not supported; supported: 1")
  return read_scaling(file, given, rotation_kind(given), int(settings["arch.head_dim"]), settings)


def read_scaling(
  file: ConfigFile, given: Mapping[str, Any], kind: str, rotated: int, settings: Settings
) -> tuple[float, Scaling | None]:
  """Reads (theta, scaling of the kind `kind`) of a rotary embedding of `rotated` features.

  `settings` has the values of earlier rows of the table. Problems are added to `file`.
  """
  inner = ConfigFile(given, {LENGTH: file.get("max_position_embeddings"), "rope_theta": 1e4})
  theta = inner.number("rope_theta") or 1e4
  scaling = None
  if kind in SCALINGS:
    scaling = {"rope_type": kind, **SCALINGS[kind](inner, rotated // 2, float(settings["max_len"]))}
  elif kind != "default":
    inner.problems.append(f"rope_type={shortened(kind)}: not supported; choose default, {', '.join(SCALINGS)}")
  file.problems += [f"rope_scaling.{problem}" if kind != "default" else problem for problem in inner.problems]
  return theta, scaling


def _required(inner: ConfigFile, *names: str) -> Scaling:
  """The numbers `names`, which must be in the file."""
  inner.defaults = {**inner.defaults, **dict.fromkeys(names, REQUIRED)}
  return {name: inner.number(name) for name in names}


def _linear(inner: ConfigFile, pairs: int, longest: float) -> Scaling:
  return _required(inner, "factor")


def _llama3(inner: ConfigFile, pairs: int, longest: float) -> Scaling:
  return {**_required(inner, "factor", "low_freq_factor", "high_freq_factor"), LENGTH: inner.number(LENGTH)}


def _dynamic(inner: ConfigFile, pairs: int, longest: float) -> Scaling:
  """The original length is max_position_embeddings, as in transformers, which ignores other fields."""
  return {**_required(inner, "factor"), LENGTH: longest}


def _yarn(inner: ConfigFile, pairs: int, longest: float) -> Scaling:
  """A missing attention factor is computed from `factor`, and from the two `mscale` fields of DeepSeek if present."""
  original = inner.number(LENGTH) or longest
  factor = _required(inner, "factor")["factor"] or longest / original
  scale, scale_all = inner.number("mscale"), inner.number("mscale_all_dim")
  attention = inner.number("attention_factor")
  if attention is None and scale and scale_all:
    attention = yarn_scale(factor, scale) / yarn_scale(factor, scale_all)
  truncate = inner.values.get("truncate")
  if truncate not in (None, True, False):
    inner.problems.append(f"truncate={shortened(truncate)}: must be true or false")
  return {
    "factor": factor,
    LENGTH: original,
    "attention_factor": yarn_scale(factor) if attention is None else attention,
    "beta_fast": inner.number("beta_fast") or 32.0,
    "beta_slow": inner.number("beta_slow") or 1.0,
    "truncate": truncate is not False,
  }


def yarn_scale(factor: float, scale: float = 1.0) -> float:
  """The factor of cosines and sines in YaRN (arXiv 2309.00071, equation 22, whose square root is applied to each)."""
  return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(inner: ConfigFile, pairs: int, longest: float) -> Scaling:
  original = inner.number(LENGTH) or longest
  inner.defaults = {**inner.defaults, "short_factor": REQUIRED, "long_factor": REQUIRED}
  return {
    "short_factor": inner.numbers("short_factor", pairs),
    "long_factor": inner.numbers("long_factor", pairs),
    LENGTH: original,
    "attention_factor": inner.number("attention_factor")
    or longrope_attention_factor(longest, original, inner.number("factor")),
  }


def longrope_attention_factor(longest: float, original: float, factor: float | None) -> float:
  """The factor of cosines and sines in LongRoPE (arXiv 2402.13753, section 3.4), computed from the lengths."""
  stretch = factor if factor is not None else longest / original
  return 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))


# rope_type -> function of (fields, pairs of rotated features, max_position_embeddings) that returns our settings
SCALINGS: Mapping[str, Callable[[ConfigFile, int, float], Scaling]] = {
  "linear": _linear,
  "llama3": _llama3,
  "yarn": _yarn,
  "dynamic": _dynamic,
  "longrope": _longrope,
}


def _read_one_rotation(file: ConfigFile, settings: Settings) -> None:
  given = rotation_fields(file)
  settings["arch.rope_theta"], settings["arch.rope_scaling"] = read_rotation(file, given, settings)


def write_rotation(model: ModelConfig) -> dict[str, Any]:
  """Writes rope_theta and rope_scaling in the layout of transformers 4, which version 5 reads too."""
  arch, scaling = arch_of(model), arch_of(model).rope_scaling
  if scaling and scaling.get("rope_type") == "dynamic":
    scaling = {name: value for name, value in scaling.items() if name != LENGTH}  # max_position_embeddings
  elif scaling and LENGTH in scaling:
    scaling = scaling | {LENGTH: whole_number(scaling[LENGTH])}
  return {"rope_theta": arch.rope_theta, "rope_scaling": scaling}


ROTATION = ConfigRule(_read_one_rotation, write_rotation)  # one rotary embedding for all layers

"""Checks of model settings that several families share: heads, activations, rotary embeddings, windows."""

from collections.abc import Iterable, Iterator

from lora_exp.config.errors import did_you_mean
from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.config_table import ACTIVATIONS

LENGTH = "original_max_position_embeddings"
ROTATIONS = {  # rope_type -> the required fields of `rope_scaling`
  "default": (),
  "linear": ("factor",),
  "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
  "yarn": ("factor", LENGTH, "attention_factor", "beta_fast", "beta_slow", "truncate"),
  "dynamic": ("factor", LENGTH),
  "longrope": ("short_factor", "long_factor", LENGTH, "attention_factor"),
}


def one_of(setting: str, value: object, choices: Iterable[str]) -> Iterator[str]:
  """A problem if `value` is not among `choices`."""
  names = sorted(choices)
  if value not in names:
    yield f"{setting}={value}: choose {', '.join(names)}{did_you_mean(str(value), names)}"


def check_heads(model: ModelConfig) -> Iterator[str]:
  """Checks that the number of heads divides the width."""
  if model.heads >= 1 and model.width % model.heads:
    yield f"model.heads={model.heads}: must divide model.width={model.width}"


def check_learned_positions(model: ModelConfig) -> Iterator[str]:
  """Checks the settings of GPT-2."""
  yield from check_heads(model)
  yield from one_of("model.arch.activation", (model.arch or ArchConfig()).activation, set(ACTIVATIONS.values()))


def check_rotary(model: ModelConfig) -> Iterator[str]:
  """Checks the settings of Llama's module and its subclasses."""
  arch = model.arch or ArchConfig()
  if arch.kv_heads < 1 or model.heads % arch.kv_heads:
    yield f"model.arch.kv_heads={arch.kv_heads}: must divide model.heads={model.heads}"
  yield from one_of("model.arch.activation", arch.activation, set(ACTIVATIONS.values()))
  rotating = int(arch.head_dim * arch.partial_rotary_factor)
  if not 0 < arch.partial_rotary_factor <= 1 or rotating % 2:
    yield (f"model.arch.partial_rotary_factor={arch.partial_rotary_factor}: must rotate an even number of the "
           f"model.arch.head_dim={arch.head_dim} features")
  if arch.window is not None and arch.window < 1:
    yield f"model.arch.window={arch.window}: must be at least 1, or null"
  yield from _check_scaling(arch)


def _check_scaling(arch: ArchConfig) -> Iterator[str]:
  scaling = arch.rope_scaling or {}
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  yield from one_of("model.arch.rope_scaling.rope_type", kind, ROTATIONS)
  for name in ROTATIONS.get(kind, ()):
    if scaling.get(name) is None:
      yield f"model.arch.rope_scaling.{name}=null: rope_type={kind} needs it"

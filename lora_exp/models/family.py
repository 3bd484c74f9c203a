"""What the rest of the program needs to know of a model family, as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flax import nnx

from lora_exp.config import ModelConfig


@dataclass(frozen=True)
class Family:
  """A family of models: how to build one, its target presets, and the logical axes of its parameters."""

  build: Callable[..., nnx.Module]  # build(cfg, vocab_size, rngs=rngs)
  presets: Mapping[str, Sequence[str]]  # preset -> patterns of module paths
  axes: Mapping[str, Sequence[str | None]]  # end of a parameter's path -> a logical axis for each of its dimensions
  units: Callable[[ModelConfig], Mapping[str, int]]  # logical axis -> pieces it may be cut into, where not its length

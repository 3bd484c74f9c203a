"""What the rest of the program needs to know of a model family, as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax
from flax import nnx

from lora_exp.config import ModelConfig


class LanguageModel(Protocol):
  """What the loss and the sampler call."""

  @property
  def head(self) -> nnx.Linear:
    """The vocabulary projection, apart from the rest so that the loss can be chunked."""

  def hidden(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array, cache: Any = None, slot: Any = 0
  ) -> tuple[jax.Array, Any]:
    """Features (B, T, D) before the head; with a cache, also the cache with T more slots filled from `slot` on."""

  def empty_cache(self, batch: int, slots: int) -> Any:
    """A cache with no slot filled."""


@dataclass(frozen=True)
class Family:
  """A family of models: how to build one, its target presets, and the logical axes of its parameters."""

  build: Callable[..., nnx.Module]  # build(cfg, vocab_size, rngs=rngs)
  presets: Mapping[str, Sequence[str]]  # preset -> patterns of module paths
  axes: Mapping[str, Sequence[str | None]]  # end of a parameter's path -> a logical axis for each of its dimensions
  units: Callable[[ModelConfig], Mapping[str, int]]  # logical axis -> pieces it may be cut into, where not its length

"""What the rest of the program needs to know of a model family: the language model's methods, and facts as data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.layers import capped, causal_mask


class LanguageModel(nnx.Module):
  """What the loss and the sampler call. A family gives `head`, `hidden` and `empty_cache`."""

  softcap: float | None = None  # logits are cap·tanh(logit/cap)

  @property
  def head(self) -> nnx.Linear | nnx.Embed:
    """The vocabulary projection, apart from the rest so that the loss can be chunked; tied: the token embedding."""
    raise NotImplementedError

  def hidden(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array, cache: Any = None, slot: Any = 0
  ) -> tuple[jax.Array, Any]:
    """Features (B, T, D) before the head; with a cache, also the cache with T more slots filled from `slot` on.

    `mask_BTS` says which slots hold what a position may see; a model with windows narrows it itself.
    """
    raise NotImplementedError

  def empty_cache(self, batch: int, slots: int) -> Any:
    """A cache with no slot filled."""
    raise NotImplementedError

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    """Logits (B, T, V) of whole rows, each one document."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD, _ = self.hidden(tokens_BT, positions, causal_mask(jnp.ones_like(tokens_BT)))
    return self.logits(x_BTD)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) of features, all at once."""
    head = self.head
    return capped(head.attend(x_BTD) if isinstance(head, nnx.Embed) else head(x_BTD), self.softcap)


@dataclass(frozen=True)
class Names:
  """How published checkpoints call a family's tensors: `P.kernel`, `P.scale` and `P.embedding` are `prefix`P.weight."""

  prefix: str = "model."  # before every path; the head has none
  transposed: bool = True  # kernels are stored (out, in), as torch's Linear does; GPT-2's Conv1D does not
  ignore: tuple[str, ...] = ()  # regular expressions of tensors that may be there and are not needed


@dataclass(frozen=True)
class Family:
  """A family of models: how to build one, its target presets, and the logical axes of its parameters."""

  build: Callable[..., nnx.Module]  # build(cfg, vocab_size, rngs=rngs)
  presets: Mapping[str, Sequence[str]]  # preset -> patterns of module paths
  axes: Mapping[str, Sequence[str | None]]  # end of a parameter's path -> a logical axis for each of its dimensions
  units: Callable[[ModelConfig], Mapping[str, int]]  # logical axis -> pieces it may be cut into, where not its length
  names: Names | None = None  # of a family that others publish

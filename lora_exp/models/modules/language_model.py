"""The interface of a language model, used by the loss and the sampler."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.models.modules.attention import causal_mask, softcap


class LanguageModel(nnx.Module):
  """Maps token ids to features and features to logits. Subclasses define `head`, `hidden` and `empty_cache`."""

  softcap: float | None = None  # logits are cap·tanh(logit/cap)

  @property
  def head(self) -> nnx.Linear | nnx.Embed:
    """The vocabulary projection, separate so that the loss can be chunked; in a tied model, the token embedding."""
    raise NotImplementedError

  def hidden(
    self, tokens_BT: jax.Array, positions_BT: jax.Array, mask_BTS: jax.Array, cache: Any = None, slot: Any = 0
  ) -> tuple[jax.Array, Any]:
    """Computes the features before the head.

    Args:
      tokens_BT: token ids, int32.
      positions_BT: the position of each token in its document, int32.
      mask_BTS: which of S slots each token attends to, bool; a model with windows restricts it further.
      cache: keys and values of earlier tokens, or None; then S = T.
      slot: the cache slot of the first token.

    Returns:
      Features (B, T, D) in the model's dtype, and the cache with T more slots filled (None for each layer without one).
    """
    raise NotImplementedError

  def empty_cache(self, batch: int, slots: int) -> Any:
    """A cache of zeros for `slots` positions in `batch` rows."""
    raise NotImplementedError

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    """Logits (B, T, V) of rows with one document each; `tokens_BT`: token ids, int32."""
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    x_BTD, _ = self.hidden(tokens_BT, positions, causal_mask(jnp.ones_like(tokens_BT)))
    return self.logits(x_BTD)

  def logits(self, x_BTD: jax.Array) -> jax.Array:
    """Logits (B, T, V) of features, not chunked."""
    head = self.head
    return softcap(head.attend(x_BTD) if isinstance(head, nnx.Embed) else head(x_BTD), self.softcap)

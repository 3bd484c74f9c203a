"""Pieces that the model families share: masks, attention with a key/value cache, the block's feed-forward."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.runtime.fusion import apart

Array = jax.Array
Cache = dict[str, Array]  # key and value, each (B, S, K, h): S slots, filled from the left
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": nnx.silu,
  "gelu": lambda x: nnx.gelu(x, approximate=False),
  "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
  "relu": nnx.relu,
}


def causal_mask(segments_BT: Array) -> Array:
  """(B, T, T): position t sees position s of its own document at or before it; padding (segment 0) sees itself."""
  same = segments_BT[:, :, None] == segments_BT[:, None, :]
  return same & jnp.tril(jnp.ones(same.shape[-2:], bool))


def attend(
  q_BTHh: Array,
  k_BSKh: Array,
  v_BSKh: Array,
  mask_BTS: Array,
  *,
  scale: float | None = None,
  softcap: float | None = None,
) -> Array:
  """softmax(scale·q·k)·v over the positions that the mask shows, in float32; returns (B, T, H, h).

  H/K query heads share a key/value head; `scale` is 1/sqrt(h) by default, and scores may be capped.
  Heads go before positions first: on a CPU the gradient takes 0.6 of the time of `jax.nn.dot_product_attention`'s.
  Divided after the product with v, so that of all (T, S) arrays the backward pass keeps the exponentials alone.
  """
  B, T, H, h = q_BTHh.shape
  K = k_BSKh.shape[2]
  # The queries of a group lie one after another, so that each key head needs one product.
  q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, h)
  k, v = k_BSKh.swapaxes(1, 2), v_BSKh.swapaxes(1, 2)
  z = jnp.einsum("bkmd,bksd->bkms", q, k, preferred_element_type=jnp.float32) * (h**-0.5 if scale is None else scale)
  z = capped(z, softcap).reshape(B, K, H // K, T, -1)
  z = jnp.where(mask_BTS[:, None, None], z, jnp.finfo(z.dtype).min).reshape(B, K, (H // K) * T, -1)
  e = jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True)))
  y = jnp.einsum("bkms,bksd->bkmd", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
  y = (y / e.sum(-1, keepdims=True)).astype(v.dtype)
  return y.reshape(B, K, H // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def capped(z: Array, cap: float | None) -> Array:
  """cap·tanh(z/cap), or `z` without a cap."""
  return z if cap is None else cap * jnp.tanh(z / cap)


def empty_cache(blocks: int, batch: int, slots: int, heads: int, head_dim: int, dtype) -> list[Cache]:
  """A cache of zeros for each of `blocks`, with no slot filled."""
  new = lambda: jnp.zeros((batch, slots, heads, head_dim), dtype)
  return [{"key": new(), "value": new()} for _ in range(blocks)]


def fill_cache(cache: Cache, k_BTKh: Array, v_BTKh: Array, slot) -> Cache:
  """`cache` with keys and values written from `slot` on."""
  put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=1)
  return {"key": put(cache["key"], k_BTKh), "value": put(cache["value"], v_BTKh)}


def run_blocks(
  blocks: Sequence, x_BTD: Array, sees: Sequence, caches: list[Cache] | None, slot, remat: bool
) -> tuple[Array, list]:
  """x through the blocks in turn, each with what it sees of the positions; and the cache of each (None without one).

  With `remat` a block keeps its input alone and is computed once more in the backward pass.
  """
  call = lambda block, *args: block(*args)
  run = jax.checkpoint(call) if remat else call
  x_BTD, kept = apart(x_BTD), []  # an adapted embedding is added up before the first norm, as the base's is
  for i, (block, seen) in enumerate(zip(blocks, sees, strict=True)):
    x_BTD, cache = run(block, x_BTD, seen, caches and caches[i], slot)
    kept.append(cache)
  return x_BTD, kept


class Attention(nnx.Module):
  """Multi-head attention with kernels (D, H·h): paths `query`, `key`, `value`, `out`."""

  def __init__(self, width: int, heads: int, *, dtype, param_dtype, kernel_init, rngs: nnx.Rngs):
    self.heads = heads
    new = lambda: nnx.Linear(width, width, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs)
    self.query, self.key, self.value, self.out = new(), new(), new(), new()

  def __call__(
    self, x_BTD: Array, mask_BTS: Array, cache: Cache | None = None, slot: Array | int = 0
  ) -> tuple[Array, Cache | None]:
    """Attends over x itself, or over `cache` after x's keys and values were written at `slot`."""
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
    q, k, v = split(self.query(x_BTD)), split(self.key(x_BTD)), split(self.value(x_BTD))
    if cache is not None:
      cache = fill_cache(cache, k, v, slot)
      k, v = cache["key"], cache["value"]
    return self.out(attend(q, k, v, mask_BTS).reshape(x_BTD.shape)), cache

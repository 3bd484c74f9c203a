"""Common parts of the modules: masks, attention, the key/value cache, and the loop over blocks."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.models.attention_kernel import uses_cudnn
from lora_exp.runtime.fusion import apart

Array = jax.Array
Cache = dict[str, Array]  # key and value, each (B, S, K, h): S slots, filled from the left


def gelu(x: Array) -> Array:
  """The exact GELU: x·Φ(x), computed with the error function."""
  return nnx.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
  """The tanh approximation of GELU (arXiv 1606.08415, section 2)."""
  return nnx.gelu(x, approximate=True)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": nnx.silu,
  "gelu": gelu,
  "gelu_tanh": gelu_tanh,
  "relu": nnx.relu,
}


def causal_mask(segments_BT: Array) -> Array:
  """The attention mask, bool (B, T, T): each position attends to its own document, up to itself.

  `segments_BT` numbers the documents of a row, int; padding (segment 0) attends to padding.
  """
  same = segments_BT[:, :, None] == segments_BT[:, None, :]
  return same & jnp.tril(jnp.ones(same.shape[-2:], bool))


def attend(
  q_BTHh: Array,
  k_BSKh: Array,
  v_BSKh: Array,
  mask_BTS: Array,
  *,
  scale: float | None = None,
  cap: float | None = None,
) -> Array:
  """softmax(scale·q·k)·v over the positions in the mask; returns (B, T, H, h) in v's dtype.

  H/K query heads share a key/value head; `scale` is 1/sqrt(h) by default; `cap` is a soft cap of the scores. With
  T = S, a position must not attend to later ones.
  """
  T, S, h = q_BTHh.shape[1], k_BSKh.shape[1], q_BTHh.shape[3]
  if q_BTHh.dtype == k_BSKh.dtype and uses_cudnn(jax.default_backend(), q_BTHh.dtype.name, T, S, h, cap):
    return attend_with_cudnn(q_BTHh, k_BSKh, v_BSKh, mask_BTS, scale=scale)
  return attend_with_xla(q_BTHh, k_BSKh, v_BSKh, mask_BTS, scale=scale, cap=cap)


def attend_with_cudnn(
  q_BTHh: Array, k_BTKh: Array, v_BTKh: Array, mask_BTT: Array, *, scale: float | None = None
) -> Array:
  """`attend` by cuDNN's flash attention, for float16 and bfloat16 on a GPU. The scores are never stored."""
  B, T, H, _ = q_BTHh.shape
  mask_BHTT = jnp.broadcast_to(mask_BTT[:, None], (B, H, T, T))  # under vmap, JAX does not broadcast over heads
  return jax.nn.dot_product_attention(
    q_BTHh, k_BTKh, v_BTKh, mask=mask_BHTT, scale=scale, is_causal=True, implementation="cudnn"
  )


def attend_with_xla(
  q_BTHh: Array,
  k_BSKh: Array,
  v_BSKh: Array,
  mask_BTS: Array,
  *,
  scale: float | None = None,
  cap: float | None = None,
) -> Array:
  """`attend` with scores in float32.

  Arrays are transposed to heads before positions: on a CPU the gradient takes 0.6 of the time of
  `jax.nn.dot_product_attention`. The division follows the product with v, so the backward pass stores only one (T, S)
  array, the exponentials.
  """
  B, T, H, h = q_BTHh.shape
  K = k_BSKh.shape[2]
  # The queries of a group are concatenated, so that each key head needs a single product.
  q = q_BTHh.reshape(B, T, K, H // K, h).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, h)
  k, v = k_BSKh.swapaxes(1, 2), v_BSKh.swapaxes(1, 2)
  z = jnp.einsum("bkmd,bksd->bkms", q, k, preferred_element_type=jnp.float32) * (h**-0.5 if scale is None else scale)
  z = softcap(z, cap).reshape(B, K, H // K, T, -1)
  z = jnp.where(mask_BTS[:, None, None], z, jnp.finfo(z.dtype).min).reshape(B, K, (H // K) * T, -1)
  e = jnp.exp(z - jax.lax.stop_gradient(z.max(-1, keepdims=True)))
  y = jnp.einsum("bkms,bksd->bkmd", e.astype(v.dtype), v, preferred_element_type=jnp.float32)
  y = (y / e.sum(-1, keepdims=True)).astype(v.dtype)
  return y.reshape(B, K, H // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)


def softcap(z: Array, cap: float | None) -> Array:
  """cap·tanh(z/cap), or `z` without a cap."""
  return z if cap is None else cap * jnp.tanh(z / cap)


def split_heads(x_BTF: Array, *shape: int) -> Array:
  """Splits features (B, T, H·h) into heads (B, T, H, h); `shape` is (H, -1) or (-1, h)."""
  return x_BTF.reshape(*x_BTF.shape[:2], *shape)


def empty_cache(blocks: int, batch: int, slots: int, heads: int, head_dim: int, dtype: Any) -> list[Cache]:
  """A cache of zeros for each of `blocks`: keys and values (B, S, K, h)."""
  shape = (batch, slots, heads, head_dim)
  return [{"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)} for _ in range(blocks)]


def fill_cache(cache: Cache, k_BTKh: Array, v_BTKh: Array, slot: Array | int) -> Cache:
  """Returns `cache` with keys and values written from `slot` on."""

  def write(old: Array, new: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), slot, axis=1)

  return {"key": write(cache["key"], k_BTKh), "value": write(cache["value"], v_BTKh)}


def run_blocks(
  blocks: Sequence[nnx.Module],
  x_BTD: Array,
  views: Sequence[Any],
  caches: list[Cache] | None,
  slot: Array | int,
  remat: bool,
) -> tuple[Array, list[Cache | None]]:
  """Applies the blocks to x (B, T, D); returns the result and the cache of each block (None without one).

  `views` are the positional inputs of each block: a mask, or a mask and the rotations. With `remat`, a block saves only
  its input and is recomputed in the backward pass.
  """

  def call(block: Any, *args: Any) -> tuple[Array, Cache | None]:
    result: tuple[Array, Cache | None] = block(*args)
    return result

  run = jax.checkpoint(call) if remat else call
  # The sum of an adapted embedding must not be fused into the first norm, which would change its bits.
  x_BTD = apart(x_BTD)
  new_caches: list[Cache | None] = []
  for i, (block, view) in enumerate(zip(blocks, views, strict=True)):
    x_BTD, cache = run(block, x_BTD, view, caches and caches[i], slot)
    new_caches.append(cache)
  return x_BTD, new_caches

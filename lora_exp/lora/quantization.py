"""Quantised kernels (QLoRA, arXiv 2305.14314): int8, int4 or nf4 by qwix, with one scale per tile of inputs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.config import InputError

TILE = 64  # largest number of inputs that share a scale, as in the paper; the tile must divide the number of inputs
KINDS = ("int8", "int4", "nf4")
INSTALL = "pip install 'lora_exp[quant]'"


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["kind", "dtype"])
@dataclass(frozen=True)
class Quantised:
  """A quantised kernel (I, O).

  Two 4-bit codes are packed into a byte: on a CPU, JAX stores each 4-bit value in a byte of its own, and does not
  accept 4-bit arrays as arguments of a compiled function.
  """

  codes: jax.Array  # int8 (I, O), or uint8 (I/2, O) for packed 4-bit codes
  scale: jax.Array  # (tiles, O)
  kind: str
  dtype: Any  # of the dense kernel

  @property
  def shape(self) -> tuple[int, int]:
    """(I, O) of the dense kernel."""
    rows, out = self.codes.shape
    return (2 * rows if self.codes.dtype == jnp.uint8 else rows), out


def quantise(w_IO: jax.Array, kind: str) -> Quantised:
  """Quantises a kernel (I, O) to `kind`, one of `KINDS`. Raises InputError if qwix is not installed."""
  inputs = w_IO.shape[0]
  tile = max(n for n in range(1, TILE + 1) if inputs % n == 0)
  tile = inputs if tile < TILE // 8 else tile  # no useful divisor, as for a prime: one scale for all inputs
  q = _qwix(kind).quantize(w_IO, kind, channelwise_axes=(1,), tiled_axes={0: tile})
  codes = q.qvalue
  if kind != "int8" and w_IO.shape[0] % 2 == 0:
    pairs = jnp.moveaxis(codes.reshape(-1, 2, w_IO.shape[1]), 1, 2)
    codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
  elif kind != "int8":
    codes = codes.astype(jnp.int8)
  return Quantised(codes, q.scale, kind, w_IO.dtype)


def is_quantised(w: Any) -> bool:
  """Whether `w` is a kernel returned by `quantise`."""
  return isinstance(w, Quantised)


def dense(w: Any, dtype: Any = None) -> jax.Array:
  """Returns `w` dequantised to `dtype` (default: its dtype before quantisation); a dense `w` is returned unchanged."""
  if not is_quantised(w):
    return w
  qwix = _qwix(w.kind)
  four_bits = jnp.uint4 if w.kind == "nf4" else jnp.int4
  codes = w.codes
  if codes.dtype == jnp.uint8:
    codes = jnp.moveaxis(jax.lax.bitcast_convert_type(codes, four_bits), 2, 1).reshape(w.shape)
  elif w.kind != "int8":
    codes = codes.astype(four_bits)
  return qwix.dequantize(qwix.QArray(codes, w.scale, None, w.kind)).astype(dtype or w.dtype)


def _qwix(kind: str) -> Any:
  """The module qwix, an optional dependency."""
  try:
    import qwix
  except ImportError:
    raise InputError(f"lora.quant={kind} needs qwix: {INSTALL}") from None
  return qwix

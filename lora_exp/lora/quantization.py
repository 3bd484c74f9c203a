"""Quantised kernels (QLoRA, arXiv 2305.14314): int8, int4 or nf4 through qwix, a scale for each tile of inputs."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.config import InputError

TILE = 64  # inputs that share a scale, as in the paper; or the most below it that divide the kernel's
KINDS = ("int8", "int4", "nf4")
INSTALL = "pip install 'lora_exp[quant]'"


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["kind", "dtype"])
@dataclass(frozen=True)
class Quantised:
  """A kernel (I, O) in few bits. Codes of four bits lie in pairs in a byte, (I/2, O): jax holds each in one of its own
  on a CPU, and refuses arrays of them as arguments of a compiled step.
  """

  codes: jax.Array
  scale: jax.Array  # (tiles, O)
  kind: str
  dtype: Any  # of the dense kernel

  @property
  def shape(self) -> tuple[int, int]:
    """(I, O) of the dense kernel."""
    rows, out = self.codes.shape
    return (2 * rows if self.codes.dtype == jnp.uint8 else rows), out


def quantise(w_IO: jax.Array, kind: str) -> Quantised:
  """A kernel (I, O) in the bits of `kind`. Raises InputError where qwix is not installed."""
  inputs = w_IO.shape[0]
  tile = max(n for n in range(1, TILE + 1) if inputs % n == 0)
  tile = inputs if tile < TILE // 8 else tile  # a prime number of inputs: one scale for all of them
  q = _qwix(kind).quantize(w_IO, kind, channelwise_axes=(1,), tiled_axes={0: tile})
  codes = q.qvalue
  if kind != "int8" and w_IO.shape[0] % 2 == 0:
    pairs = jnp.moveaxis(codes.reshape(-1, 2, w_IO.shape[1]), 1, 2)
    codes = jax.lax.bitcast_convert_type(pairs, jnp.uint8)
  elif kind != "int8":
    codes = codes.astype(jnp.int8)
  return Quantised(codes, q.scale, kind, w_IO.dtype)


def is_quantised(w: Any) -> bool:
  """Whether `w` is what `quantise` returns."""
  return isinstance(w, Quantised)


def dense(w: Any, dtype: Any = None) -> jax.Array:
  """The kernel as an array: as it is, or dequantised into `dtype` (by default the one that it had)."""
  if not is_quantised(w):
    return w
  qwix = _qwix(w.kind)
  four = jnp.uint4 if w.kind == "nf4" else jnp.int4
  codes = w.codes
  if codes.dtype == jnp.uint8:
    codes = jnp.moveaxis(jax.lax.bitcast_convert_type(codes, four), 2, 1).reshape(w.shape)
  elif w.kind != "int8":
    codes = codes.astype(four)
  return qwix.dequantize(qwix.QArray(codes, w.scale, None, w.kind)).astype(dtype or w.dtype)


def _qwix(kind: str) -> Any:
  try:
    import qwix
  except ImportError:
    raise InputError(f"lora.quant={kind} needs qwix: {INSTALL}") from None
  return qwix

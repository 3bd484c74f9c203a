"""Dropout of the base and of adapters, and the random keys of a run.

A module with dropout has a `DropKey`, a placeholder that is not part of the stored state. Each step sets every DropKey
to fold_in(fold_in(key(seed), step), hash of the module's path). So no key is saved, and adding a module does not change
the masks of other modules.
"""

import zlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class DropKey(nnx.Variable):
  """The random key of a module's dropout; a placeholder outside of a step."""


def placeholder() -> DropKey:
  """A `DropKey` before the step fills it."""
  return DropKey(jax.random.key(0))


def path_key(key: jax.Array, path: str) -> jax.Array:
  """`key` folded with a stable hash of a dotted module path."""
  return jax.random.fold_in(key, zlib.crc32(path.encode()))


def path_keys(key: jax.Array, paths: Sequence[str]) -> jax.Array:
  """`path_key` for each of `paths`, as an array of keys."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.array([zlib.crc32(p.encode()) for p in paths], jnp.uint32))


def stream_key(seed: int, stream: str) -> jax.Array:
  """The key of a seed for one purpose (`adapter`, `dropout`, `sample`); the streams of a seed are independent."""
  return path_key(jax.random.key(seed), stream)


def dropout(x: jax.Array, rate: float | jax.Array, key: jax.Array) -> jax.Array:
  """Zeros each element of `x` with probability `rate` and scales the others by 1/(1 - rate).

  The rate may be traced; a rate of 0 returns `x` bit for bit. Each random 32-bit word is used for two elements, because
  random bits cost more than the products of a small adapter, so the rate is rounded to a multiple of 1/65,536.
  """
  *lead, width = x.shape
  words = jax.random.bits(key, (*lead, (width + 1) // 2), jnp.uint32)
  halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*lead, -1)[..., :width]
  keep = halves >= jnp.round(jnp.asarray(rate, jnp.float32) * 65536).astype(jnp.uint32)
  return jnp.where(keep, x / (1 - jnp.asarray(rate, x.dtype)), 0)


class Dropout(nnx.Module):
  """Dropout of a base model at a static rate; active if `deterministic` is False and the step has filled the key."""

  def __init__(self, rate: float):
    self.rate = rate
    self.deterministic = True
    self.key = placeholder()

  def __call__(self, x: jax.Array) -> jax.Array:
    if self.deterministic or self.rate == 0:
      return x
    return dropout(x, self.rate, self.key[...])

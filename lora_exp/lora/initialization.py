"""Random initialization of A: the distributions of `lora.init`.

A is drawn as (R, I) and transposed. The first columns are therefore the same for every rank: a trial padded to a larger
rank in a pack is initialized as in a separate run.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.runtime.dropout import path_keys


def _kaiming(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """U(±1/√fan), the default of PEFT: kaiming_uniform with a = √5."""
  return jax.random.uniform(key, shape, jnp.float32, -1, 1) * (1 / math.sqrt(fan))


def he_uniform(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """U(±√(6/fan)), the default of Flax's LoRA."""
  return jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / fan)


def _xavier_uniform(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """U(±√(6/(fan + R))), the default of Penzai's LoRA."""
  return jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / (fan + rank))


def _normal(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """N(0, std²); std defaults to 1/√R."""
  return jax.random.normal(key, shape) * (std or 1 / math.sqrt(rank))


def _gaussian(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """N(0, 1/R²), PEFT's init_lora_weights="gaussian"."""
  return jax.random.normal(key, shape) * (1 / rank)


def _orthogonal(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """Orthonormal columns of A by QR; a column depends only on the columns before it."""
  rows = jax.random.normal(key, shape)  # (R, I)
  if shape[0] > shape[1]:
    return jnp.linalg.qr(rows)[0]
  q, r = jnp.linalg.qr(rows.T)
  return (q * jnp.sign(jnp.diagonal(r))).T


DISTRIBUTIONS: dict[str, Callable[..., jax.Array]] = {
  "kaiming": _kaiming,
  "he_uniform": he_uniform,
  "xavier_uniform": _xavier_uniform,
  "normal": _normal,
  "gaussian": _gaussian,
  "orthogonal": _orthogonal,
}
DECOMPOSED = ("orthogonal",)  # drawn one after another: on CPU, two QRs of jaxlib at once can wait for ever
RANK_FREE = ("kaiming", "he_uniform")  # distributions whose values do not depend on the rank
RANK_MULTIPLE = 16  # these are drawn at the next multiple and cut, so that all ranks of a sweep share a program


def draw_a(key: jax.Array, init: str, fan: int, features: int, rank: int, std: float | None = None) -> jax.Array:
  """Draws A (features, rank) from the distribution `init`, for fan-in `fan`; `std` is for init="normal"."""
  return DISTRIBUTIONS[init](key, (rank, features), fan, rank, std).T


class _Group(NamedTuple):
  """Modules whose A is drawn in one call have these in common."""

  lead: tuple[int, ...]  # axes before (I, O)
  fan: int
  features: int
  rank: int


def draw_all(
  rows: Sequence[AdaptedModule],
  fans: Mapping[str, int],
  leads: Mapping[str, tuple[int, ...]],
  key: jax.Array,
  init: str,
  std: float | None,
) -> dict[str, jax.Array]:
  """Draws A (…, I, R) of every module in `rows`, by path, from `key` folded with the path.

  `fans` and `leads` are the fan-in of A and the axes before (I, O), by path. Each kernel of a stack gets its own A.
  Modules of one shape are drawn in one call, which compiles once.
  """
  groups: dict[_Group, list[str]] = {}
  for row in rows:
    drawn_rank = -(-row.rank // RANK_MULTIPLE) * RANK_MULTIPLE if init in RANK_FREE else row.rank
    groups.setdefault(_Group(leads[row.path], fans[row.path], row.fan_in, drawn_rank), []).append(row.path)
  pairs = tuple((group, tuple(paths)) for group, paths in groups.items())
  if init not in DECOMPOSED:
    drawn = _draw_groups(key, pairs, init, std)
  else:
    drawn = {}
    for pair in pairs:
      drawn |= jax.block_until_ready(_draw_groups(key, (pair,), init, std))
  return {row.path: _first_columns(drawn[row.path], row.rank) for row in rows}


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_groups(
  key: jax.Array, groups: tuple[tuple[_Group, tuple[str, ...]], ...], init: str, std: float | None
) -> dict[str, jax.Array]:
  """A of every module; `groups` are pairs of a `_Group` and the paths of its modules."""

  def draw_module(group: _Group, key: jax.Array) -> jax.Array:
    """A (*lead, I, R) of one module."""
    draw_one = partial(draw_a, init=init, fan=group.fan, features=group.features, rank=group.rank, std=std)
    if not group.lead:
      return draw_one(key)
    stacked = jax.vmap(draw_one)(jax.random.split(key, math.prod(group.lead)))
    return stacked.reshape(*group.lead, *stacked.shape[1:])

  drawn: dict[str, jax.Array] = {}
  for group, paths in groups:
    drawn |= dict(zip(paths, jax.vmap(partial(draw_module, group))(path_keys(key, paths)), strict=True))
  return drawn


def _first_columns(a: jax.Array, rank: int) -> jax.Array:
  """A cut to (…, I, rank); in numpy unless traced, as JAX would compile one program per shape."""
  if a.shape[-1] == rank:
    return a
  return a[..., :rank] if isinstance(a, jax.core.Tracer) else jnp.asarray(np.asarray(a)[..., :rank])


def is_abstract(w: Any) -> bool:
  """Whether `w` is abstract: a shape and dtype without values."""
  return isinstance(w, jax.ShapeDtypeStruct)

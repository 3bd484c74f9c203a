"""How a random A starts: the distributions of `lora.init`, drawn so that no number depends on the rank.

A is drawn as (rank, in) and transposed. A trial that is padded to a larger rank in a pack therefore starts as it would
alone, and rank 4 starts as the first half of rank 8.
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
  """PEFT's: kaiming_uniform with a = sqrt(5)."""
  return jax.random.uniform(key, shape, jnp.float32, -1, 1) * (1 / math.sqrt(fan))


def he_uniform(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """flax's and the JAX tutorial's: U(±√(6/fan))."""
  return jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / fan)


def _xavier_uniform(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """penzai's."""
  return jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(6 / (fan + rank))


def _normal(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  return jax.random.normal(key, shape) * (std or 1 / math.sqrt(rank))


def _gaussian(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """PEFT's."""
  return jax.random.normal(key, shape) * (1 / rank)


def _orthogonal(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """Orthonormal columns of A; each follows from those before it, so rank 4 is the first half of rank 8."""
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
RANK_FREE = ("kaiming", "he_uniform")  # distributions whose numbers do not depend on the rank
RANK_MULTIPLE = 16  # ranks that are drawn at once for these, so that one program serves all ranks of a sweep


def draw_a(key: jax.Array, init: str, fan: int, features: int, rank: int, std: float | None = None) -> jax.Array:
  """A (features, rank) from the distribution `init`; `fan` inputs add up in one output of A."""
  return DISTRIBUTIONS[init](key, (rank, features), fan, rank, std).T


class _Group(NamedTuple):
  """What modules have in common whose A is drawn in one call."""

  lead: tuple[int, ...]  # axes of a stack of kernels
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
  """A (…, I, R) of every row, from `key` folded with the module's path.

  Each kernel of a stack has an A of its own. Modules of one shape are drawn in one call, so that layers compile once.
  """
  groups: dict[_Group, list[str]] = {}
  for row in rows:
    drawn_rank = -(-row.rank // RANK_MULTIPLE) * RANK_MULTIPLE if init in RANK_FREE else row.rank
    groups.setdefault(_Group(leads[row.path], fans[row.path], row.fan_in, drawn_rank), []).append(row.path)
  drawn = _draw_groups(key, tuple((group, tuple(paths)) for group, paths in groups.items()), init, std)
  return {row.path: _first_columns(drawn[row.path], row.rank) for row in rows}


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_groups(key: jax.Array, groups, init: str, std: float | None) -> dict[str, jax.Array]:
  def one(group: _Group, key: jax.Array) -> jax.Array:
    draw_one = partial(draw_a, init=init, fan=group.fan, features=group.features, rank=group.rank, std=std)
    if not group.lead:
      return draw_one(key)
    stacked = jax.vmap(draw_one)(jax.random.split(key, math.prod(group.lead)))
    return stacked.reshape(*group.lead, *stacked.shape[1:])

  drawn: dict[str, jax.Array] = {}
  for group, paths in groups:
    drawn |= dict(zip(paths, jax.vmap(partial(one, group))(path_keys(key, paths)), strict=True))
  return drawn


def _first_columns(a: jax.Array, rank: int) -> jax.Array:
  """A (…, I, rank); cut outside of jax where there are values, as each shape would be a program of its own."""
  if a.shape[-1] == rank:
    return a
  return a[..., :rank] if isinstance(a, jax.core.Tracer) else jnp.asarray(np.asarray(a)[..., :rank])


def is_abstract(w: Any) -> bool:
  """Whether `w` is a shape without values."""
  return isinstance(w, jax.ShapeDtypeStruct)

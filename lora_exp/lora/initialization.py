"""What adapters start as: A drawn or taken from the base's kernel, B at zero, and what a method adds.

Whatever the start, the model answers as its base until a step was taken: where A·B is not zero (PiSSA, OLoRA) the same
A₀·B₀ is subtracted, and W is not touched.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import InputError
from lora_exp.lora import formula
from lora_exp.lora.adapter import AdaptedModule
from lora_exp.lora.quantization import dense
from lora_exp.runtime.dropout import path_key, path_keys

Kernels = Mapping[str, Any]  # path -> W (…, I, O), perhaps quantised, or its shape


def _uniform(bound: Callable[[int, int], float]):
  return lambda key, shape, fan, rank, std: jax.random.uniform(key, shape, jnp.float32, -1, 1) * bound(fan, rank)


def _normal(std_of: Callable[[int, int, float | None], float]):
  return lambda key, shape, fan, rank, std: jax.random.normal(key, shape) * std_of(fan, rank, std)


def _orthogonal(key: jax.Array, shape: tuple[int, int], fan: int, rank: int, std: float | None) -> jax.Array:
  """Orthonormal columns of A, from those before: rank 4 is the first half of rank 8."""
  rows = jax.random.normal(key, shape)  # (R, I)
  if shape[0] > shape[1]:
    return jnp.linalg.qr(rows)[0]
  q, r = jnp.linalg.qr(rows.T)
  return (q * jnp.sign(jnp.diagonal(r))).T


INITS: dict[str, Callable[..., jax.Array]] = {
  "kaiming": _uniform(lambda fan, rank: 1 / math.sqrt(fan)),  # PEFT's: kaiming_uniform with a = sqrt(5)
  "he_uniform": _uniform(lambda fan, rank: math.sqrt(6 / fan)),  # flax's and the JAX tutorial's
  "xavier_uniform": _uniform(lambda fan, rank: math.sqrt(6 / (fan + rank))),  # penzai's
  "normal": _normal(lambda fan, rank, std: std or 1 / math.sqrt(rank)),
  "gaussian": _normal(lambda fan, rank, std: 1 / rank),  # PEFT's
  "orthogonal": _orthogonal,
}
ANY_RANK, DRAWN = ("kaiming", "he_uniform"), 16  # inits whose numbers do not depend on the rank; its multiples drawn
KERNEL_INITS = ("pissa", "olora")  # inits that take both A and B from W
LAMBDA_D = 0.1  # what VeRA's d starts as, in its paper (arXiv 2310.11454) and in PEFT
ADALORA_STD = 0.02  # of AdaLoRA's A and B (arXiv 2303.10512), as in PEFT


def draw_a(key: jax.Array, init: str, fan: int, features: int, rank: int, std: float | None = None) -> jax.Array:
  """A (features, rank), drawn as (rank, features): the first r columns do not depend on how many follow.

  So a trial padded to a larger rank starts as it would alone, and rank 4 as the first half of rank 8.
  """
  return INITS[init](key, (rank, features), fan, rank, std).T


def draw(
  table: Sequence[AdaptedModule],
  fans: Mapping[str, int],
  kernels: Kernels,
  key: jax.Array,
  *,
  method: str = "lora",
  init: str = "kaiming",
  std: float | None = None,
  done: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, jax.Array]]:
  """The leaves of every row of `table` before the first step, each drawn from `key` folded with the module's path.

  `fans` says how many inputs add up in an output of A (1 for a look-up, else I). Kernels may be shapes alone, but for
  the inits `pissa` and `olora` and the method `dora`: these then give zeros, right in shape. `done` is called after
  each module whose kernel was decomposed.
  """
  if init in KERNEL_INITS and method != "lora":
    raise InputError(f"lora.init={init}: goes with lora.method=lora alone, not with {method}")
  if method == "vera":
    return _vera(table, key)
  if init in KERNEL_INITS:
    started = {}
    for row in table:
      started[row.path] = _from_kernel(init, row, kernels[row.path])
      done()
  else:
    drawn = _drawn(table, fans, kernels, key, init, std, method)
    started = {row.path: {"lora_a": drawn[row.path], "lora_b": _zeros(row, kernels, "RO")} for row in table}
  for row in table:
    started[row.path] |= _of_method(method, row, kernels, key)
  return started


def _drawn(table, fans, kernels, key, init, std, method) -> dict[str, jax.Array]:
  """A of every row. Each kernel of a stack has its own; modules alike are drawn as one, so that layers compile once.

  Where the rank decides no number, more of them are drawn than are kept: then one program serves all trials of a sweep.
  """
  how, spread = ("normal", ADALORA_STD) if method == "adalora" else (init, std)
  alike: dict[Kind, list[str]] = {}
  for row in table:
    drawn_rank = -(-row.rank // DRAWN) * DRAWN if how in ANY_RANK else row.rank
    kind = Kind(_lead(kernels[row.path]), fans[row.path], row.fan_in, drawn_rank)
    alike.setdefault(kind, []).append(row.path)
  found = _draw_alike(key, tuple((kind, tuple(paths)) for kind, paths in alike.items()), how, spread)
  return {row.path: _first_columns(found[row.path], row.rank) for row in table}


class Kind(NamedTuple):
  """What modules have in common whose A is drawn at once."""

  lead: tuple[int, ...]  # axes of a stack of kernels
  fan: int
  features: int
  rank: int


@partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_alike(key: jax.Array, alike, init: str, std: float | None) -> dict[str, jax.Array]:
  def one(kind: Kind, key: jax.Array) -> jax.Array:
    draw_one = lambda k: draw_a(k, init, kind.fan, kind.features, kind.rank, std)
    if not kind.lead:
      return draw_one(key)
    stacked = jax.vmap(draw_one)(jax.random.split(key, math.prod(kind.lead)))
    return stacked.reshape(*kind.lead, *stacked.shape[1:])

  found: dict[str, jax.Array] = {}
  for kind, paths in alike:
    found |= dict(zip(paths, jax.vmap(partial(one, kind))(path_keys(key, paths)), strict=True))
  return found


def _first_columns(a: jax.Array, rank: int) -> jax.Array:
  """A (…, I, rank); cut outside of jax where there are numbers, as each shape would be a program of its own."""
  if a.shape[-1] == rank:
    return a
  return a[..., :rank] if isinstance(a, jax.core.Tracer) else jnp.asarray(np.asarray(a)[..., :rank])


def complete(leaves: formula.Leaves, w: Any) -> dict[str, Any]:
  """`leaves` of one module with the norm that DoRA takes from its kernel W (…, I, O)."""
  if "magnitude" not in leaves or "kernel_norm2" in leaves:
    return dict(leaves)
  norm2 = jnp.zeros(leaves["magnitude"].shape) if is_abstract(w) else formula.squared_norm(dense(w))
  return {**leaves, "kernel_norm2": norm2}


def _of_method(method: str, row: AdaptedModule, kernels: Kernels, key: jax.Array) -> dict[str, jax.Array]:
  w = kernels[row.path]
  if method == "dora":
    norm2 = _zeros(row, kernels, "O") if is_abstract(w) else formula.squared_norm(dense(w))
    return {"magnitude": jnp.sqrt(norm2), "kernel_norm2": norm2}
  if method == "adalora":
    shape = (*_lead(w), row.rank, row.fan_out)
    b = ADALORA_STD * jax.random.normal(jax.random.fold_in(path_key(key, row.path), 1), shape)
    return {"lora_b": b, "lora_e": _zeros(row, kernels, "R")}
  return {}


def _vera(table: Sequence[AdaptedModule], key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """One random pair for all modules, as large as the largest, and vectors for each: d at 0.1 and b at zero."""
  ins, outs = max(row.fan_in for row in table), max(row.fan_out for row in table)
  rank = max(row.rank for row in table)
  shared_a = draw_a(path_key(key, "vera_a"), "he_uniform", ins, ins, rank)
  # PEFT draws B as (out, rank) with a fan-in of the rank; row by row, so that padding changes no row.
  shared_b = INITS["he_uniform"](path_key(key, "vera_b"), (rank, outs), rank, rank, None)
  return {
    row.path: {
      "vera_a": shared_a,
      "vera_b": shared_b,
      "lambda_d": jnp.full((row.rank,), LAMBDA_D),
      "lambda_b": jnp.zeros((row.fan_out,)),
    }
    for row in table
  }


def _from_kernel(init: str, row: AdaptedModule, w: Any) -> dict[str, jax.Array]:
  """A and B out of W (…, I, O), and the same once more as A₀ and B₀."""
  if is_abstract(w):
    a, b = jnp.zeros((*_lead(w), row.fan_in, row.rank)), jnp.zeros((*_lead(w), row.rank, row.fan_out))
  else:
    found_a, found_b = {"pissa": pissa, "olora": olora}[init](np.asarray(dense(w), np.float32), row.rank, row.scale)
    beyond = row.rank - found_a.shape[-1]  # a kernel has no more directions than its smaller side
    whole = [(0, 0)] * len(_lead(w))
    a = jnp.pad(found_a, [*whole, (0, 0), (0, beyond)])
    b = jnp.pad(found_b, [*whole, (0, beyond), (0, 0)])
  return {"lora_a": a, "lora_b": b, "start_a": a, "start_b": b}


def pissa(w_IO: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
  """A and B from the `rank` largest singular directions of W, s·A·B their sum (PiSSA, arXiv 2404.02948)."""
  u, sigma, vt = np.linalg.svd(w_IO, full_matrices=False)
  root = np.sqrt(sigma[..., :rank] / scale)
  a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
  return a.astype(w_IO.dtype), b.astype(w_IO.dtype)


def olora(w_IO: np.ndarray, rank: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
  """A and B from the QR decomposition of Wᵀ: A the first rows of R, B the first columns of Q (OLoRA, 2406.01775)."""
  q, r = np.linalg.qr(np.swapaxes(w_IO, -1, -2))
  return np.swapaxes(r[..., :rank, :], -1, -2).copy(), np.swapaxes(q[..., :rank], -1, -2).copy()


def is_abstract(w: Any) -> bool:
  """Whether `w` is a shape without values."""
  return isinstance(w, jax.ShapeDtypeStruct)


def _lead(w: Any) -> tuple[int, ...]:
  return tuple(w.shape[:-2])


def _zeros(row: AdaptedModule, kernels: Kernels, axes: str) -> jax.Array:
  sizes = {"I": row.fan_in, "O": row.fan_out, "R": row.rank}
  return jnp.zeros((*_lead(kernels[row.path]), *(sizes[axis] for axis in axes)))

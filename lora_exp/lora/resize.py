"""Adapters of another rank: `resize` an adapter by SVD, or `extract` one out of a checkpoint that was tuned whole.

All of it in float64, through the thin factors P (I, K) and Q (K, O) of ΔW = P·Q, so that a resize never forms I×O
(spectrum.py). Leading axes (of stacked kernels) stay in front, each kernel of a stack with its own directions; an
error is that of the whole stack.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.methods import Leaves, Method
from lora_exp.lora.targets import select_paths
from lora_exp.runtime.spectrum import Svd, thin_svd, whole_svd

KERNELS = ("kernel", "embedding")  # what NNX calls the parameter that an adapter adapts


class Extracted(NamedTuple):
  """What `extract` found between two checkpoints."""

  adapter: Adapter
  errors: dict[str, float]  # module path -> ‖ΔW − s·A·B‖/‖ΔW‖
  rest: dict[str, float]  # path of each parameter that differs and is no target -> ‖tuned − base‖/‖base‖


def resize(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
  """Every module's best approximation of this rank, and what it costs: path -> ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius).

  s·A·B is balanced (AᵀA = B·Bᵀ) and s stays. A larger rank costs 0: columns that the update does not need are drawn
  anew in A and zero in B, as in a new adapter, so that training can use them. PiSSA, OLoRA, AdaLoRA and VeRA become
  plain LoRA. DoRA keeps its magnitude: the norm that divides follows from the new A·B, so that each output's kernel
  keeps its length m; the error told is that of A·B, before the norm. Parameters trained in full stay as they are.

  Raises InputError for a rank below 1, values that are not finite, and a method whose update is no sum: its
  `resize_problem` says why.
  """
  problems = [*rank_problems(rank), *not_finite(adapter, "the adapter")]
  kind = adapter.kind
  for row in adapter.rows:
    if problem := kind.resize_problem(row, adapter.leaves[row.path]):
      problems.append(f"{row.path}: {problem}")
  if problems:
    raise InputError(problems)
  rows, resized, errors, method = [], {}, {}, adapter.method
  for row in adapter.rows:
    leaves = adapter.leaves[row.path]
    scale = row.scale if row.scale > 0 else 1.0
    product, errors[row.path] = balanced(row.path, *update_svd(kind, leaves, row.scale), rank, scale)
    method, resized[row.path] = kind.resized(as_dtype(product, leaves.values()), leaves)
    rows.append(row_of(row.path, row.fan_in, row.fan_out, rank, scale, method, resized[row.path]))
  return Adapter(method, tuple(rows), resized, adapter.full), errors


def extract(
  base: Mapping[str, Any],
  tuned: Mapping[str, Any],
  rank: int,
  targets: str | Sequence[str] = "re:.*",
  *,
  exclude: str | Sequence[str] | None = None,
  layers_: Sequence[int] | None = None,
  presets: Mapping[str, Sequence[str]] | None = None,
  keep_rest: bool = False,
) -> Extracted:
  """A LoRA of this rank (scale 1) that takes `base` to `tuned`, as near as the rank can in every target.

  Both checkpoints are {dotted parameter path: array}: kernels (in, out), tables (V, D). Targets are module paths, as
  in `select_paths`. A kernel of more than two axes is left out: which of them are inputs only its module knows.
  `rest` names every parameter that differs and that the LoRA does not carry (norms, biases, other modules, kernels
  left out), and by how much (inf where the base is all zeros): attached to `base`, the LoRA alone leaves these as
  they were. `keep_rest=True` puts them into `adapter.full`, whole, and then it is their size that costs.

  Raises InputError that lists every parameter that one checkpoint lacks, of another shape, or not finite.
  """
  problems = [*rank_problems(rank), *_differences(base, tuned)]
  if problems:
    raise InputError(problems)
  owners = {p.rpartition(".")[0]: p for p in base if p.rpartition(".")[2] in KERNELS and np.ndim(base[p]) >= 2}
  chosen = select_paths(list(owners), targets, exclude, layers_, presets)
  flat = [path for path in chosen if np.ndim(base[owners[path]]) == 2]
  if not flat:
    found = f"{owners[chosen[0]]} {np.shape(base[owners[chosen[0]]])}"
    raise InputError(f"lora.targets={targets}: a LoRA is taken out of kernels of two axes, and none is one: {found}")
  rows, leaves, errors = [], {}, {}
  for path in flat:
    old, new = base[owners[path]], tuned[owners[path]]
    update = np.asarray(new, np.float64) - np.asarray(old, np.float64)
    ours, errors[path] = balanced(path, *whole_svd(update), rank, 1.0)
    leaves[path] = as_dtype(ours, (old, new))
    fan_in, fan_out = update.shape
    rows.append(row_of(path, fan_in, fan_out, rank, 1.0, "lora", leaves[path]))
  taken = {owners[path] for path in flat}
  rest = {p: _relative(base[p], tuned[p]) for p in base if p not in taken}
  rest = {p: share for p, share in rest.items() if share}
  full = {p: np.array(tuned[p]) for p in rest} if keep_rest else {}
  return Extracted(Adapter("lora", tuple(rows), leaves, full), errors, rest)


def columns(kind: Method, leaves: Leaves, scale: float) -> tuple[np.ndarray, np.ndarray] | None:
  """P (…, I, K) and Q (…, K, O) with ΔW = P·Q, in float64; A₀ and B₀ are columns with a negative sign.

  None where ΔW is no product of two thin factors.
  """
  wide = {name: np.asarray(x, np.float64) for name, x in leaves.items()}
  product, start = kind.factors(wide), kind.start(wide)
  if product is None:
    return None
  a, b = product
  if start is None:
    return a, scale * b
  return np.concatenate([a, start[0]], -1), scale * np.concatenate([b, -start[1]], -2)


def update_IO(kind: Method, leaves: Leaves, scale: float, kernel: Any = None) -> np.ndarray:
  """ΔW (…, I, O) before any gate, in float64 where there are thin factors, else in the leaves' dtype."""
  product = columns(kind, leaves, scale)
  return np.asarray(kind.delta(kernel, leaves, scale), np.float64) if product is None else product[0] @ product[1]


def update_svd(kind: Method, leaves: Leaves, scale: float, kernel: Any = None) -> Svd:
  """The singular value decomposition of ΔW; without forming it where there are thin factors."""
  product = columns(kind, leaves, scale)
  return whole_svd(update_IO(kind, leaves, scale, kernel)) if product is None else thin_svd(*product)


def balanced(
  path: str, u: np.ndarray, sigma: np.ndarray, vt: np.ndarray, rank: int, scale: float
) -> tuple[dict[str, np.ndarray], float]:
  """A (…, I, R) and B (…, R, O) of the `rank` largest σ, each with sqrt(σ/s); and the relative error of s·A·B."""
  kept = min(rank, sigma.shape[-1])
  root = np.sqrt(sigma[..., :kept] / scale)
  a = np.zeros((*u.shape[:-1], rank))
  b = np.zeros((*vt.shape[:-2], rank, vt.shape[-1]))
  a[..., :kept] = u[..., :kept] * root[..., None, :]
  b[..., :kept, :] = vt[..., :kept, :] * root[..., None]
  # Where both A and B were zero no gradient would ever reach them: such columns start as those of a new adapter.
  idle = np.ones((*sigma.shape[:-1], rank), bool)
  idle[..., :kept] = sigma[..., :kept] == 0
  drawn = np.random.default_rng(zlib.crc32(path.encode())).uniform(-1, 1, a.shape) / math.sqrt(a.shape[-2])
  leaves = {"lora_a": np.where(idle[..., None, :], drawn, a), "lora_b": np.where(idle[..., None], 0, b)}
  total = float(np.square(sigma).sum())
  return leaves, math.sqrt(float(np.square(sigma[..., kept:]).sum()) / total) if total else 0.0


def row_of(
  path: str, fan_in: int, fan_out: int, rank: int, scale: float, method: str, leaves: Leaves
) -> AdaptedModule:
  """The row of the table for these leaves; alpha is what makes alpha/rank the scale."""
  declared = methods.get(method).leaves
  count = sum(x.size for name, x in leaves.items() if declared[name].trained)
  return AdaptedModule(path, fan_in, fan_out, rank, scale * rank, scale, count)


def as_dtype(leaves: Mapping[str, np.ndarray], like) -> dict[str, np.ndarray]:
  """`leaves` in float64 if one of the arrays `like` is, else in float32."""
  wide = any(np.asarray(x).dtype == np.float64 for x in like)
  return {name: np.ascontiguousarray(x, np.float64 if wide else np.float32) for name, x in leaves.items()}


def rank_problems(rank: Any) -> list[str]:
  """What is wrong with a rank, in a sentence."""
  whole = isinstance(rank, int | np.integer) and not isinstance(rank, bool) and rank >= 1
  return [] if whole else [f"rank is {rank!r}: it must be a whole number from 1 up"]


def not_finite(adapter: Adapter, whose: str) -> list[str]:
  """A sentence for each array of `adapter` that holds NaN or inf."""
  return [
    f"{whose}: {path}.{name} holds values that are not finite"
    for path, own in adapter.leaves.items()
    for name, x in own.items()
    if not np.isfinite(np.asarray(x)).all()
  ]


def _differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
  """Why two checkpoints cannot be compared: a sentence for every parameter amiss."""
  problems = [f"{p} is in the base and not in the tuned checkpoint" for p in base if p not in tuned]
  problems += [f"{p} is in the tuned checkpoint and not in the base" for p in tuned if p not in base]
  for p in base:
    if p in tuned and np.shape(base[p]) != np.shape(tuned[p]):
      problems.append(f"{p} is {np.shape(base[p])} in the base and {np.shape(tuned[p])} in the tuned checkpoint")
  for whose, params in (("base", base), ("tuned checkpoint", tuned)):
    bad = [p for p, x in params.items() if not np.isfinite(np.asarray(x)).all()]
    problems += [f"{p} holds values that are not finite in the {whose}" for p in bad]
  return problems


def _relative(base: Any, tuned: Any) -> float:
  """‖tuned − base‖/‖base‖; inf where only the base is all zeros."""
  old, new = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
  apart, size = float(np.linalg.norm(new - old)), float(np.linalg.norm(old))
  return apart / size if size else (math.inf if apart else 0.0)

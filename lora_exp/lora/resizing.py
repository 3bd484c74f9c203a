"""Low-rank approximation by SVD: `resize` changes the rank of an adapter, `extract` computes one from two checkpoints.

All computations are in float64. Where ΔW = P·Q has thin factors P (I, K) and Q (K, O), the SVD is computed from these
without forming ΔW (runtime/spectrum.py). Each kernel of a stack is approximated separately; errors are reported for the
stack.
"""

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_exp.config import InputError
from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.methods import Leaves, Method
from lora_exp.lora.targets import select_paths
from lora_exp.runtime.spectrum import Svd, thin_svd, whole_svd

KERNELS = ("kernel", "embedding")  # names of the parameters that can be adapted


class Extracted(NamedTuple):
  """The result of `extract`."""

  adapter: Adapter
  errors: dict[str, float]  # module path -> relative error ‖ΔW − s·A·B‖/‖ΔW‖
  rest: dict[str, float]  # path of each other parameter that differs -> ‖tuned − base‖/‖base‖


def resize(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, float]]:
  """Approximates the update of every module at `rank`, optimally in the Frobenius norm.

  Returns the new adapter and the relative error ‖ΔW − ΔW'‖/‖ΔW‖ of every module, by path. The new factors are balanced
  (AᵀA = B·Bᵀ), and the scale s is unchanged. At a larger rank the error is 0; surplus columns of A are random and the
  rows of B zero, as in a new adapter, so that they can be trained. PiSSA, OLoRA, AdaLoRA, VeRA and LoHa become LoRA.
  DoRA keeps its magnitude m, so that each column of the kernel keeps its norm; its error is that of A·B, before
  normalization. Parameters that were trained in full are copied.

  Raises InputError for a rank below 1, for values that are not finite, and for a method whose `resize_problem` gives a
  reason.
  """
  problems = [*rank_problems(rank), *not_finite(adapter, "the adapter")]
  kind = adapter.kind
  for row in adapter.rows:
    problem = kind.resize_problem(row, adapter.leaves[row.path])
    if problem is not None:
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
  return Adapter(method, tuple(rows), resized, adapter.full, adapter.base), errors


def extract(
  base: Mapping[str, Any],
  tuned: Mapping[str, Any],
  rank: int,
  targets: str | Sequence[str] = "re:.*",
  *,
  exclude: str | Sequence[str] | None = None,
  blocks: Sequence[int] | None = None,
  presets: Mapping[str, Sequence[str]] | None = None,
  keep_rest: bool = False,
) -> Extracted:
  """Computes the LoRA (rank `rank`, scale 1) that best approximates `tuned` − `base` in every target.

  Both checkpoints are {dotted parameter path: array}, with kernels (I, O) and embedding tables (V, D). `targets`,
  `exclude`, `blocks` and `presets` select modules as in `select_paths`. Kernels with more than two axes are skipped,
  as only their modules know which axes are inputs.

  `rest` of the result lists the parameters that differ but that the LoRA does not change (norms, biases, other modules,
  skipped kernels), with their relative difference (inf if the base is zero). With `keep_rest`, their tuned values are
  stored in `adapter.full`.

  Raises InputError that lists every parameter that is missing in a checkpoint, differs in shape, or is not finite.
  """
  problems = [*rank_problems(rank), *_differences(base, tuned)]
  if problems:
    raise InputError(problems)
  owners = {p.rpartition(".")[0]: p for p in base if p.rpartition(".")[2] in KERNELS and np.ndim(base[p]) >= 2}
  targeted = select_paths(list(owners), targets, exclude, blocks, presets)
  two_axes = [path for path in targeted if np.ndim(base[owners[path]]) == 2]
  if not two_axes:
    example = f"{owners[targeted[0]]} {np.shape(base[owners[targeted[0]]])}"
    raise InputError(f"lora.targets={targets}: no target has a kernel of two axes, which `extract` requires: {example}")
  rows, leaves, errors = [], {}, {}
  for path in two_axes:
    base_kernel, tuned_kernel = base[owners[path]], tuned[owners[path]]
    update = np.asarray(tuned_kernel, np.float64) - np.asarray(base_kernel, np.float64)
    factors, errors[path] = balanced(path, *whole_svd(update), rank, 1.0)
    leaves[path] = as_dtype(factors, (base_kernel, tuned_kernel))
    fan_in, fan_out = update.shape
    rows.append(row_of(path, fan_in, fan_out, rank, 1.0, "lora", leaves[path]))
  extracted = {owners[path] for path in two_axes}
  differences = {p: _relative_difference(base[p], tuned[p]) for p in base if p not in extracted}
  rest = {p: difference for p, difference in differences.items() if difference}
  full = {p: np.array(tuned[p]) for p in rest} if keep_rest else {}
  return Extracted(Adapter("lora", tuple(rows), leaves, full), errors, rest)


def columns(kind: Method, leaves: Leaves, scale: float) -> tuple[np.ndarray, np.ndarray] | None:
  """Returns P (…, I, K) and Q (…, K, O) with ΔW = P·Q, in float64, or None if ΔW has no thin factors.

  A₀ and B₀ are additional columns of P and (negated) rows of Q.
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
  """Returns ΔW (…, I, O) before any gate, as float64.

  It is computed in float64 if ΔW has thin factors, else in the dtype of the leaves. `kernel` is W, for methods whose ΔW
  depends on it.
  """
  product = columns(kind, leaves, scale)
  return np.asarray(kind.delta(kernel, leaves, scale), np.float64) if product is None else product[0] @ product[1]


def update_svd(kind: Method, leaves: Leaves, scale: float, kernel: Any = None) -> Svd:
  """Returns the singular value decomposition of ΔW, which is not formed if it has thin factors."""
  product = columns(kind, leaves, scale)
  return whole_svd(update_IO(kind, leaves, scale, kernel)) if product is None else thin_svd(*product)


def balanced(
  path: str, u: np.ndarray, sigma: np.ndarray, vt: np.ndarray, rank: int, scale: float
) -> tuple[dict[str, np.ndarray], float]:
  """Returns LoRA leaves from the `rank` largest singular values, and the relative error of s·A·B.

  A (…, I, R) and B (…, R, O) both contain the factor √(σ/s). `path` seeds the random columns of A where σ is 0.
  """
  retained = min(rank, sigma.shape[-1])
  root = np.sqrt(sigma[..., :retained] / scale)
  a = np.zeros((*u.shape[:-1], rank))
  b = np.zeros((*vt.shape[:-2], rank, vt.shape[-1]))
  a[..., :retained] = u[..., :retained] * root[..., None, :]
  b[..., :retained, :] = vt[..., :retained, :] * root[..., None]
  # If A and B were both zero, their gradients would be too. Such columns of A are random, as in a new adapter.
  unused = np.ones((*sigma.shape[:-1], rank), bool)
  unused[..., :retained] = sigma[..., :retained] == 0
  drawn = np.random.default_rng(zlib.crc32(path.encode())).uniform(-1, 1, a.shape) / math.sqrt(a.shape[-2])
  leaves = {"lora_a": np.where(unused[..., None, :], drawn, a), "lora_b": np.where(unused[..., None], 0, b)}
  total = float(np.square(sigma).sum())
  return leaves, math.sqrt(float(np.square(sigma[..., retained:]).sum()) / total) if total else 0.0


def row_of(
  path: str, fan_in: int, fan_out: int, rank: int, scale: float, method: str, leaves: Leaves
) -> AdaptedModule:
  """Returns the table entry of a module with these leaves; alpha is rank·scale."""
  declared = methods.get(method).leaves
  count = sum(x.size for name, x in leaves.items() if declared[name].trained)
  return AdaptedModule(path, fan_in, fan_out, rank, scale * rank, scale, count)


def as_dtype(leaves: Mapping[str, np.ndarray], sources: Iterable[Any]) -> dict[str, np.ndarray]:
  """Returns `leaves` as float64 if any array of `sources` is float64, else as float32."""
  wide = any(np.asarray(x).dtype == np.float64 for x in sources)
  return {name: np.ascontiguousarray(x, np.float64 if wide else np.float32) for name, x in leaves.items()}


def rank_problems(rank: Any) -> list[str]:
  """Returns the problem with a rank that is not a positive integer, in a list."""
  valid = isinstance(rank, int | np.integer) and not isinstance(rank, bool) and rank >= 1
  return [] if valid else [f"rank is {rank!r}: it must be an integer of at least 1"]


def not_finite(adapter: Adapter, label: str) -> list[str]:
  """Returns a problem for every array of `adapter` that has NaN or infinite values; `label` names the adapter."""
  return [
    f"{label}: {path}.{name} has values that are not finite"
    for path, leaves in adapter.leaves.items()
    for name, x in leaves.items()
    if not np.isfinite(np.asarray(x)).all()
  ]


def _differences(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
  """Problems with checkpoints that differ in names or shapes, or are not finite, one for each parameter."""
  problems = [f"{p} is in the base and not in the tuned checkpoint" for p in base if p not in tuned]
  problems += [f"{p} is in the tuned checkpoint and not in the base" for p in tuned if p not in base]
  for p in base:
    if p in tuned and np.shape(base[p]) != np.shape(tuned[p]):
      problems.append(f"{p} is {np.shape(base[p])} in the base and {np.shape(tuned[p])} in the tuned checkpoint")
  for label, params in (("base", base), ("tuned checkpoint", tuned)):
    not_finite_paths = [p for p, x in params.items() if not np.isfinite(np.asarray(x)).all()]
    problems += [f"{p} has values that are not finite in the {label}" for p in not_finite_paths]
  return problems


def _relative_difference(base: Any, tuned: Any) -> float:
  """‖tuned − base‖/‖base‖; inf if the base is zero and `tuned` is not."""
  wide_base, wide_tuned = np.asarray(base, np.float64), np.asarray(tuned, np.float64)
  difference, norm = float(np.linalg.norm(wide_tuned - wide_base)), float(np.linalg.norm(wide_base))
  if norm == 0:
    return math.inf if difference else 0.0
  return difference / norm

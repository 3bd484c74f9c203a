"""Several adapters as one: the weighted sum of their updates, exactly, at a chosen rank, or by TIES."""

from collections.abc import Sequence

import numpy as np

from lora_exp.config import InputError
from lora_exp.config.errors import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.resize import as_dtype, balanced, columns, not_finite, rank_problems, row_of, update_IO
from lora_exp.runtime.spectrum import thin_svd, whole_svd

WAYS = ("exact", "svd", "ties")
Pair = tuple[np.ndarray, np.ndarray]  # P (…, I, K) and Q (…, K, O) of one weighted update P·Q


def combine_adapters(
  adapters: Sequence[Adapter],
  weights: Sequence[float],
  *,
  how: str = "exact",
  rank: int | None = None,
  density: float = 0.2,
) -> Adapter:
  """One plain LoRA (scale 1) out of several adapters of one base, each times its weight (negative ones subtract).

  `how`:
    exact  Σ wᵢ·ΔWᵢ itself: factors side by side, so that ranks add up and no cross term Aᵢ·Bⱼ arises
           (PEFT's add_weighted_adapter("linear") has them). A module that only some adapt is summed over these.
    svd    its best approximation of rank `rank`, without forming I×O.
    ties   TIES (arXiv 2306.01708): of every wᵢ·ΔWᵢ each kernel's `density` largest entries stay, each entry takes
           the sign of their sum, and the mean over those of that sign that are not zero; then SVD to `rank`. It is a
           mean, not a sum: weights of 1 give the paper's, and its λ is a factor on all weights. Forms ΔW, a module
           at a time.

  PiSSA, OLoRA, AdaLoRA, VeRA and LoHa are taken as the updates that they are. Raises InputError for no adapter, weights
  that do not fit, modules of unlike shape, values that are not finite, methods whose update is no sum (DoRA, IA³) and
  parameters trained in full (the base's value would be needed).
  """
  problems = [*_settings(adapters, weights, how, rank, density), *_misfits(adapters)]
  if problems:
    raise InputError(problems)
  rows, leaves = [], {}
  for row in {row.path: row for adapter in adapters for row in adapter.rows}.values():
    owners = [(a, w, r) for a, w in zip(adapters, weights, strict=True) for r in a.rows if r.path == row.path]
    pairs = [_factors(a, r, float(w)) for a, w, r in owners]
    new = _combined(row.path, pairs, how, rank, density)
    leaves[row.path] = as_dtype(new, [x for a, _, _ in owners for x in a.leaves[row.path].values()])
    found = leaves[row.path]["lora_a"].shape[-1]
    rows.append(row_of(row.path, row.fan_in, row.fan_out, found, 1.0, "lora", leaves[row.path]))
  return Adapter("lora", tuple(rows), leaves)


def _factors(adapter: Adapter, row: AdaptedModule, weight: float) -> Pair:
  """P and Q of weight·ΔW; where ΔW is no thin product, from its singular value decomposition."""
  leaves, scale = adapter.leaves[row.path], weight * row.scale
  product = columns(adapter.kind, leaves, scale)
  if product is not None:
    return product
  u, sigma, vt = whole_svd(update_IO(adapter.kind, leaves, scale))
  return u * sigma[..., None, :], vt


def _combined(path: str, pairs: Sequence[Pair], how: str, rank: int | None, density: float) -> dict[str, np.ndarray]:
  """A and B of one module."""
  if how == "ties":
    merged = ties(np.stack([p @ q for p, q in pairs]), density)
    return balanced(path, *whole_svd(merged), rank or 0, 1.0)[0]
  p, q = np.concatenate([p for p, _ in pairs], -1), np.concatenate([q for _, q in pairs], -2)
  if how == "svd":
    return balanced(path, *thin_svd(p, q), rank or 0, 1.0)[0]
  return {"lora_a": p, "lora_b": q}


def ties(updates: np.ndarray, density: float) -> np.ndarray:
  """Trim, elect sign, disjoint mean (arXiv 2306.01708, section 4) of updates (N, …, I, O), each with its weight in."""
  flat = updates.reshape(*updates.shape[:-2], -1)
  count = max(1, round(density * flat.shape[-1]))
  largest = np.argpartition(np.abs(flat), -count, axis=-1)[..., -count:]
  trimmed = np.zeros_like(flat)
  np.put_along_axis(trimmed, largest, np.take_along_axis(flat, largest, -1), -1)
  elected = np.sign(trimmed.sum(0))
  agreeing = np.where(np.sign(trimmed) == elected, trimmed, 0)
  counted = (agreeing != 0).sum(0)
  return (agreeing.sum(0) / np.maximum(counted, 1)).reshape(updates.shape[1:])


def _settings(adapters, weights, how: str, rank: int | None, density: float) -> list[str]:
  problems = []
  if not adapters:
    problems.append("there is no adapter to combine: give at least one")
  if len(adapters) != len(weights):
    problems.append(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
  if not np.isfinite(np.asarray(weights, np.float64)).all():
    problems.append(f"weights are {list(weights)}: each must be a finite number")
  if how not in WAYS:
    problems.append(f"how={how} is none of {', '.join(WAYS)}{did_you_mean(how, WAYS)}")
  elif how == "exact" and rank is not None:
    problems.append(f"rank={rank}: how=exact has the sum of the ranks; how=svd has one of your choice")
  elif how != "exact" and rank is None:
    problems.append(f"how={how} needs a rank")
  elif how != "exact":
    problems += rank_problems(rank)
  if how == "ties" and not 0 < density <= 1:
    problems.append(f"density is {density}: it is the share of entries kept, above 0 and at most 1")
  return problems


def _misfits(adapters: Sequence[Adapter]) -> list[str]:
  """What keeps these adapters from being summed, a sentence each."""
  problems: list[str] = []
  shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
  for i, adapter in enumerate(adapters):
    whose = f"adapters[{i}]"
    problems += not_finite(adapter, whose)
    if not adapter.kind.additive:
      problems.append(
        f"{whose} is a {adapter.kind.title}, whose update is no sum: merge it into a copy of the base, extract a LoRA "
        "out of the two, and combine that"
      )
    if adapter.full:
      problems.append(
        f"{whose} trained {', '.join(adapter.full)} in full: without the base's values these are no updates; combine "
        "adapters trained without lora.bias and lora.train_modules"
      )
    for row in adapter.rows:
      found = (*adapter.kind.lead_of(adapter.leaves[row.path]), row.fan_in, row.fan_out)
      first, shape = shapes.setdefault(row.path, (i, found))
      if shape != found:
        problems.append(f"{row.path} is {found} in {whose} and {shape} in adapters[{first}]: they are not of one base")
  return problems

"""Combination of several adapters into one: a weighted sum of updates, exact or at a given rank, or TIES merging."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lora_exp.config import InputError
from lora_exp.config.errors import did_you_mean
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.methods import Leaves, Method
from lora_exp.lora.resizing import as_dtype, balanced, columns, not_finite, rank_problems, row_of, update_IO
from lora_exp.runtime.spectrum import thin_svd, whole_svd

METHODS = ("exact", "svd", "ties")
ThinProduct = tuple[np.ndarray, np.ndarray]  # P (…, I, K) and Q (…, K, O) of a weighted update P·Q


def combine_adapters(
  adapters: Sequence[Adapter],
  weights: Sequence[float],
  *,
  how: str = "exact",
  rank: int | None = None,
  density: float = 0.2,
) -> Adapter:
  """Combines adapters of one base into a plain LoRA with scale 1. Weights may be negative.

  `how` is one of
    exact  Σ wᵢ·ΔWᵢ. The factors are concatenated, so ranks add up. Unlike PEFT's add_weighted_adapter("linear"), there
           are no cross terms Aᵢ·Bⱼ. A module that only some adapters adapt is the sum over these.
    svd    the best approximation of that sum at rank `rank`, computed without forming ΔW.
    ties   TIES merging (arXiv 2306.01708), then SVD to `rank`. Each wᵢ·ΔWᵢ is trimmed to the fraction `density` of its
           largest entries. The sign of each entry is that of the sum; its value is the mean of the nonzero entries of
           this sign. Weights of 1 give the paper's method; its λ is a common factor of all weights. Forms ΔW of one
           module at a time.

  PiSSA, OLoRA, AdaLoRA, VeRA and LoHa are combined by their updates ΔW.

  Raises InputError if there is no adapter, a weight is missing or not finite, modules differ in shape, values are not
  finite, a method is not additive (DoRA, IA³), or an adapter changes its base or has parameters that were trained in
  full, whose update cannot be computed without the base.
  """
  problems = [*_setting_problems(adapters, weights, how, rank, density), *_adapter_problems(adapters)]
  if problems:
    raise InputError(problems)
  rows, leaves = [], {}
  for path, updates in _updates_by_module(adapters, weights).items():
    combined = _combine(path, [update.thin_product() for update in updates], how, rank, density)
    leaves[path] = as_dtype(combined, [x for update in updates for x in update.leaves.values()])
    row, combined_rank = updates[0].row, leaves[path]["lora_a"].shape[-1]
    rows.append(row_of(path, row.fan_in, row.fan_out, combined_rank, 1.0, "lora", leaves[path]))
  return Adapter("lora", tuple(rows), leaves)


class _WeightedUpdate(NamedTuple):
  """weight·ΔW of one module of one adapter."""

  kind: Method
  row: AdaptedModule
  leaves: Leaves
  weight: float

  def thin_product(self) -> ThinProduct:
    """P and Q, by SVD if the method has no thin factors."""
    scale = self.weight * self.row.scale
    product = columns(self.kind, self.leaves, scale)
    if product is not None:
      return product
    u, sigma, vt = whole_svd(update_IO(self.kind, self.leaves, scale))
    return u * sigma[..., None, :], vt


def _updates_by_module(adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[_WeightedUpdate]]:
  """The updates that are combined in each module, by path."""
  updates: dict[str, list[_WeightedUpdate]] = {}
  for adapter, weight in zip(adapters, weights, strict=True):
    for row in adapter.rows:
      update = _WeightedUpdate(adapter.kind, row, adapter.leaves[row.path], float(weight))
      updates.setdefault(row.path, []).append(update)
  return updates


def _combine(
  path: str, products: Sequence[ThinProduct], how: str, rank: int | None, density: float
) -> dict[str, np.ndarray]:
  """A and B of one module, from the weighted updates of several adapters."""
  if how == "ties":
    merged = ties(np.stack([p @ q for p, q in products]), density)
    return balanced(path, *whole_svd(merged), rank or 0, 1.0)[0]
  p, q = np.concatenate([p for p, _ in products], -1), np.concatenate([q for _, q in products], -2)
  if how == "svd":
    return balanced(path, *thin_svd(p, q), rank or 0, 1.0)[0]
  return {"lora_a": p, "lora_b": q}


def ties(updates: np.ndarray, density: float) -> np.ndarray:
  """Returns the TIES merge (…, I, O) of N weighted updates (N, …, I, O): trim, elect sign, disjoint mean.

  `density` is the fraction of entries that trimming keeps in each kernel. See section 4 of arXiv 2306.01708.
  """
  flat = updates.reshape(*updates.shape[:-2], -1)
  count = max(1, round(density * flat.shape[-1]))
  largest = np.argpartition(np.abs(flat), -count, axis=-1)[..., -count:]
  trimmed = np.zeros_like(flat)
  np.put_along_axis(trimmed, largest, np.take_along_axis(flat, largest, -1), -1)
  elected = np.sign(trimmed.sum(0))
  agreeing = np.where(np.sign(trimmed) == elected, trimmed, 0)
  agreeing_count = (agreeing != 0).sum(0)
  return (agreeing.sum(0) / np.maximum(agreeing_count, 1)).reshape(updates.shape[1:])


def _setting_problems(
  adapters: Sequence[Adapter], weights: Sequence[float], how: str, rank: int | None, density: float
) -> list[str]:
  """Problems with the arguments of `combine_adapters`."""
  problems = []
  if not adapters:
    problems.append("there is no adapter to combine: give at least one")
  if len(adapters) != len(weights):
    problems.append(f"{len(adapters)} adapters and {len(weights)} weights: give one weight for each adapter")
  if not np.isfinite(np.asarray(weights, np.float64)).all():
    problems.append(f"weights are {list(weights)}: each must be a finite number")
  if how not in METHODS:
    problems.append(f"how={how}: choose {', '.join(METHODS)}{did_you_mean(how, METHODS)}")
  elif how == "exact" and rank is not None:
    problems.append(f"rank={rank}: with how=exact the rank is the sum of the ranks; use how=svd to choose a rank")
  elif how != "exact" and rank is None:
    problems.append(f"how={how} needs a rank")
  elif how != "exact":
    problems += rank_problems(rank)
  if how == "ties" and not 0 < density <= 1:
    problems.append(f"density is {density}: the fraction of entries to keep must be above 0 and at most 1")
  return problems


def _adapter_problems(adapters: Sequence[Adapter]) -> list[str]:
  """Reasons why these adapters cannot be combined."""
  problems: list[str] = []
  shapes: dict[str, tuple[int, tuple[int, ...]]] = {}
  for i, adapter in enumerate(adapters):
    label = f"adapters[{i}]"
    problems += not_finite(adapter, label)
    if not adapter.kind.additive:
      problems.append(
        f"{label} is a {adapter.kind.title}, which is not additive: merge it into a copy of the base, extract a LoRA "
        "from the two, and combine that"
      )
    if adapter.full:
      problems.append(
        f"{label} trained {', '.join(adapter.full)} in full, whose updates are unknown without the base: combine "
        "adapters trained without lora.bias and lora.train_modules"
      )
    if adapter.base:
      problems.append(f"{label} also changes its base (its embeddings, head or biases), which cannot be combined")
    for row in adapter.rows:
      shape = (*adapter.kind.lead_of(adapter.leaves[row.path]), row.fan_in, row.fan_out)
      first, first_shape = shapes.setdefault(row.path, (i, shape))
      if shape != first_shape:
        problems.append(
          f"{row.path} is {shape} in {label} and {first_shape} in adapters[{first}]: the adapters have different bases"
        )
  return problems

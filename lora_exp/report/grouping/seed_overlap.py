"""The overlap of the directions learned with different seeds."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from lora_exp.report.reading.adapter_updates import ModuleUpdate
from lora_exp.runtime.spectrum import Svd, directions, overlap, random_overlap


class SeedOverlap(NamedTuple):
  """φ between two seeds of the directions with most of the energy, and φ of random directions."""

  inputs: float
  inputs_random: float
  outputs: float
  outputs_random: float


def seed_overlap(seeds: Sequence[Mapping[str, ModuleUpdate]]) -> SeedOverlap | None:
  """The mean over pairs of seeds and over modules with an update in both; None if there are none."""
  overlaps = [
    _module_overlap(one[path].svd, other[path].svd)
    for one, other in combinations(seeds, 2)
    for path in one
    if path in other and one[path].moved and other[path].moved
  ]
  return SeedOverlap(*(float(x) for x in np.mean(overlaps, 0))) if overlaps else None


def _module_overlap(one: Svd, other: Svd) -> SeedOverlap:
  """The overlap of one module; for a stack of kernels the mean, with the largest number of directions for all."""
  i, j = (int(directions(sigma).max()) for _, sigma, _ in (one, other))
  inputs = _overlap(one[0], other[0], i, j)
  outputs = _overlap(np.swapaxes(one[2], -1, -2), np.swapaxes(other[2], -1, -2), i, j)
  return SeedOverlap(*inputs, *outputs)


def _overlap(a: np.ndarray, b: np.ndarray, i: int, j: int) -> tuple[float, float]:
  """φ of the first i columns of a (…, N, I) and the first j of b (…, N, J), and φ of random subspaces."""
  return float(overlap(a[..., :i], b[..., :j])[..., -1, -1].mean()), random_overlap(i, j, a.shape[-2])

"""The level of the test at each of several looks at growing data, such that all looks together have a given level.

After a share t of the seeds, t^SPENDING_POWER of the level is spent. The means over the first n and the first m seeds
have the correlation sqrt(n / m), so errors at different looks often coincide. The nominal level of a look takes this
into account, and is higher than the part of the level that the look spends.

The sum of a standard normal number for each seed is followed from look to look, as probabilities of cells between
`edges`. What lies above the boundary of a look is rejected there, and does not reach the next look.

References: Lan and DeMets (1983), Discrete sequential boundaries for clinical trials; Armitage, McPherson and Rowe
(1969), Repeated significance tests on accumulating data (the recursion); Kim and DeMets (1987), Design and analysis of
group sequential tests based on the type I error spending rate function (power family).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import ndtr

SPENDING_POWER = 1.4  # a lower power stops earlier, a higher one agrees with the full grid more (tests/bench/decide.py)
CELLS = 801  # odd, so that one is centred at 0; the relative error of levels is below 1e-3
WIDTH = 8.0  # standard deviations on each side


def look_levels(looks: Sequence[int], level: float) -> list[float]:
  """The one-sided nominal level of each look. `looks`: numbers of seeds, ascending; `level`: of all looks together."""
  return list(_cached_levels(tuple(looks), level))


@cache
def _cached_levels(looks: tuple[int, ...], level: float) -> tuple[float, ...]:
  spent = level * (np.array(looks) / looks[-1]) ** SPENDING_POWER
  widest = WIDTH * looks[-1] ** 0.5
  edges = np.linspace(-widest, widest, CELLS + 1)
  probabilities = np.zeros(CELLS)
  probabilities[CELLS // 2] = 1.0  # before the first seed the sum is 0
  levels = []
  for before, seeds, part in zip((0, *looks[:-1]), looks, np.diff(spent, prepend=0.0), strict=True):
    probabilities = _add_seeds(probabilities, edges, seeds - before)
    boundary = _boundary(probabilities, edges, part)
    levels.append(float(ndtr(-boundary / seeds**0.5)))
    probabilities = _below(probabilities, edges, boundary)
  return tuple(levels)


def _add_seeds(probabilities: np.ndarray, edges: np.ndarray, seeds: int) -> np.ndarray:
  """The probabilities of the cells after further seeds."""
  centres = (edges[:-1] + edges[1:]) / 2
  below_edges = ndtr((edges[:, None] - centres[None, :]) / seeds**0.5) @ probabilities
  return np.diff(below_edges)


def _boundary(probabilities: np.ndarray, edges: np.ndarray, part: float) -> float:
  """The sum above which there is the probability `part`."""
  above_edges = np.append(probabilities[::-1].cumsum()[::-1], 0.0)
  return float(np.interp(-part, -above_edges, edges))


def _below(probabilities: np.ndarray, edges: np.ndarray, boundary: float) -> np.ndarray:
  """The probabilities of the parts of the cells below `boundary`."""
  return probabilities * np.clip((boundary - edges[:-1]) / np.diff(edges), 0.0, 1.0)

"""The level of the test at each of several looks at growing data, such that all looks together have a given level.

After a share t of the seeds, t^SPENDING_POWER of the level is spent. The means over the first n and the first m seeds
have the correlation sqrt(n / m), so errors at different looks often coincide. The nominal level of a look takes this
into account, and is higher than the part of the level that the look spends.

References: Lan and DeMets (1983), Discrete sequential boundaries for clinical trials; Armitage, McPherson and Rowe
(1969), Repeated significance tests on accumulating data (the recursion); Kim and DeMets (1987), Design and analysis of
group sequential tests based on the type I error spending rate function (power family).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import ndtr

SPENDING_POWER = 1.4  # a lower power stops earlier, a higher one agrees with the full grid more (tests/bench/decide.py)
GRID = 801  # points of the numerical integration; the relative error of levels is below 1e-3
WIDTH = 8.0  # standard deviations on each side


def look_levels(looks: Sequence[int], level: float) -> list[float]:
  """The one-sided nominal level of each look. `looks`: numbers of seeds, ascending; `level`: of all looks together."""
  return list(_nominal_levels(tuple(looks), level))


@cache
def _nominal_levels(looks: tuple[int, ...], level: float) -> tuple[float, ...]:
  spent = level * (np.array(looks) / looks[-1]) ** SPENDING_POWER
  sums, step = np.linspace(-WIDTH * looks[-1] ** 0.5, WIDTH * looks[-1] ** 0.5, GRID, retstep=True)
  edges = np.append(sums - step / 2, sums[-1] + step / 2)
  mass = np.diff(ndtr(edges / looks[0] ** 0.5))  # probability of each cell, for the sum over the first seeds
  levels = []
  for number, part in enumerate(np.diff(spent, prepend=0.0)):
    above = np.append(mass[::-1].cumsum()[::-1], 0.0)  # probability of a sum above each edge
    boundary = float(np.interp(-part, -above, edges))
    levels.append(float(ndtr(-boundary / looks[number] ** 0.5)))
    if number + 1 < len(looks):
      continuing = mass * np.clip((boundary - edges[:-1]) / step, 0.0, 1.0)  # sums below the boundary
      mass = _spread(continuing, edges, sums, (looks[number + 1] - looks[number]) ** 0.5)
  return tuple(levels)


def _spread(mass: np.ndarray, edges: np.ndarray, sums: np.ndarray, deviation: float) -> np.ndarray:
  """The probabilities `mass` of the cells around `sums` after a normal step with this standard deviation."""
  return np.diff(ndtr((edges[:, None] - sums[None, :]) / deviation) @ mass)

"""The level at which each of several looks at growing data may test, so that all of them share one level.

The share t of the seeds has spent t^SPENDING_POWER of the level. The mean over the first n seeds has the correlation
sqrt(n / m) with the mean over the first m, so that the looks are wrong together: a nominal level takes account of that
and is higher than the part that its look spends.

References: Lan and DeMets (1983), Discrete sequential boundaries for clinical trials; Armitage, McPherson and Rowe
(1969), Repeated significance tests on accumulating data (the recursion); Kim and DeMets (1987), Design and analysis of
group sequential tests based on the type I error spending rate function (power family).
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import ndtr

SPENDING_POWER = 1.4  # chosen with tests/bench/decide.py: less ends earlier, more agrees with the full grid more often
GRID = 801  # points of the numeric integration; levels are right to a thousandth of themselves
WIDTH = 8.0  # standard deviations on each side


def look_levels(looks: Sequence[int], level: float) -> list[float]:
  """The one-sided nominal level of each look, by its number of seeds. `level`: of all looks together."""
  return list(_nominal_levels(tuple(looks), level))


@cache
def _nominal_levels(looks: tuple[int, ...], level: float) -> tuple[float, ...]:
  spent = level * (np.array(looks) / looks[-1]) ** SPENDING_POWER
  sums, step = np.linspace(-WIDTH * looks[-1] ** 0.5, WIDTH * looks[-1] ** 0.5, GRID, retstep=True)
  edges = np.append(sums - step / 2, sums[-1] + step / 2)
  mass = np.diff(ndtr(edges / looks[0] ** 0.5))  # of the sum over the first seeds, in each cell
  levels = []
  for number, part in enumerate(np.diff(spent, prepend=0.0)):
    above = np.append(mass[::-1].cumsum()[::-1], 0.0)  # of the sums that are at least each edge
    boundary = float(np.interp(-part, -above, edges))
    levels.append(float(ndtr(-boundary / looks[number] ** 0.5)))
    if number + 1 < len(looks):
      kept = mass * np.clip((boundary - edges[:-1]) / step, 0.0, 1.0)  # tests below the boundary go on
      mass = _spread(kept, edges, sums, (looks[number + 1] - looks[number]) ** 0.5)
  return tuple(levels)


def _spread(mass: np.ndarray, edges: np.ndarray, sums: np.ndarray, deviation: float) -> np.ndarray:
  """`mass` in the cells around `sums` after a normal step with this standard deviation."""
  return np.diff(ndtr((edges[:, None] - sums[None, :]) / deviation) @ mass)

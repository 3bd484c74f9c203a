"""Choice of the values of the tuned setting that are tried, and of those that are scored.

    tune each setting at all factors, on one seed -> try a further one where the best is at an edge -> … -> score

Decisions depend only on the results of earlier rounds. A penalty is the metric with the sign that makes lower better;
a trial that diverged has the penalty infinity.
"""

import math
from collections.abc import Mapping

from lora_exp.sweep.rounds.round_plan import Tuning

Penalties = Mapping[float, float]  # by factor


def best_factor(penalties: Penalties) -> float:
  """The factor with the lowest penalty; the lowest factor among equal ones, as when all trials diverged."""
  return min(sorted(penalties), key=penalties.__getitem__)


def better_neighbour(penalties: Penalties) -> float | None:
  """The factor next to the best one with the lower penalty; None if that diverged or if there is none."""
  factors = sorted(penalties)
  position = factors.index(best_factor(penalties))
  neighbours = [*factors[max(0, position - 1) : position], *factors[position + 1 : position + 2]]
  best = min(neighbours, key=penalties.__getitem__, default=None)
  return None if best is None or math.isinf(penalties[best]) else best


def further_factor(penalties: Penalties, tuning: Tuning) -> float | None:
  """A factor beyond the best one if that is the lowest or the highest tried; None otherwise, or if the limit is
  reached.

  Its ratio to the best factor equals that of the last two factors at this edge.
  """
  factors = sorted(penalties)
  if len(factors) < 2 or len(factors) >= len(tuning.factors) + tuning.extend:
    return None
  best = best_factor(penalties)
  if best == factors[0]:
    return best * factors[0] / factors[1]
  return best * factors[-1] / factors[-2] if best == factors[-1] else None


def scored_factors(penalties: Penalties, tuning: Tuning) -> list[float]:
  """The factors that are trained with the seeds that score: the best and its better neighbour."""
  neighbour = better_neighbour(penalties) if tuning.neighbour else None
  return [best_factor(penalties)] if neighbour is None else sorted([best_factor(penalties), neighbour])

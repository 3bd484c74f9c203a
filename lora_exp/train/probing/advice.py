"""Rules that turn the measurements of `probe.py` into a learning rate, targets and a rank.

The rules are heuristics. `RELIABILITY` says how often each was right in `tests/bench/advise.py`, and is shown with the
advice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.train.probing.probe import Probe

TARGET_SHARE = 0.95  # share of the best targets' gain that targets with fewer parameters must reach
RANK_SHARE = 0.9  # share of the gain that the truncated update must retain
SAME_SHARE = 0.98  # share of the best rate's gain at which the configured rate is retained
# Exponent of the width by model family, where published (Thinking Machines, tinker-cookbook, 2025).
WIDTH_EXPONENTS = {"llama": 0.781, "qwen2": 0.0775, "qwen3": 0.0775}
OTHER_EXPONENT = 0.781


@dataclass(frozen=True)
class Reliability:
  """The reliability of one kind of advice in the bench."""

  right: int
  cases: int
  meaning: str  # of right

  def __str__(self) -> str:
    return f"In the bench it was {self.meaning} in {self.right} of {self.cases} cases."


RELIABILITY: Mapping[str, Reliability] = {  # of `python tests/bench/advise.py a1 a4 q2 m2 l2 docs`
  "optim.lr": Reliability(4, 6, "within a factor of two of the best rate"),
  "lora.targets": Reliability(6, 6, "within 5 % of the gain of the best targets"),
  "lora.rank": Reliability(6, 6, "within a factor of two of the smallest rank with 95 % of the gain"),
}


# Mean regrets of the same bench, as shares of the best setting's gain, and the share of the default's parameters.
ADVISED_REGRET, DEFAULT_REGRET, RULE_REGRET, ADVISED_PARAMETERS = 0.023, 0.042, 0.009, 0.26


def width_rule(family: str, width: int) -> float:
  """The rate 5e-5 · 10 · (2000/width)^p that "LoRA Without Regret" (Thinking Machines, 2025) recommends for LoRA.

  p is known for Llama and Qwen; for other families it is that of Llama.
  """
  return 5e-5 * 10 * (2000 / width) ** WIDTH_EXPONENTS.get(family, OTHER_EXPONENT)


def best_rate(rates: Sequence[float], gains: Sequence[float], configured: float) -> float:
  """The rate with the largest gain: the maximum of the parabola through it and its neighbours in log(rate).

  At an edge, or next to a diverged run, it is the best rate itself. The configured rate is kept if its gain is nearly
  as large. `rates` are sorted, and the result is rounded to two digits.
  """
  if dict(zip(rates, gains, strict=True)).get(configured, -math.inf) >= SAME_SHARE * max(gains):
    return configured
  best = int(np.argmax(gains))
  if not 0 < best < len(rates) - 1:
    return rates[best]
  x, y = np.log(rates[best - 1 : best + 2]), np.asarray(gains[best - 1 : best + 2])
  if not np.isfinite(y).all():
    return rates[best]
  second, first, _ = np.polyfit(x - x[1], y, 2)
  shift = 0.0 if second >= 0 else float(np.clip(-first / (2 * second), x[0] - x[1], x[2] - x[1]))
  return float(f"{math.exp(x[1] + shift):.2g}")


def fewest_parameters(gains: Mapping[str, float], parameters: Mapping[str, int]) -> str:
  """The targets with the fewest parameters whose gain is at least `TARGET_SHARE` of the largest."""
  enough = [name for name in gains if gains[name] >= TARGET_SHARE * max(gains.values())]
  return min(enough, key=lambda name: parameters[name])


def smallest_rank(ranks: Sequence[int], gains: Sequence[float]) -> int:
  """The smallest rank whose truncated update keeps `RANK_SHARE` of the gain of the largest rank. `ranks` are sorted."""
  return next(rank for rank, gain in zip(ranks, gains, strict=True) if gain >= RANK_SHARE * gains[-1])


@dataclass(frozen=True)
class Advice:
  """The advised settings."""

  lr: float
  targets: str  # as typed
  rank: int
  alpha: float  # as in the short runs; the same at every rank


def advise(probe: Probe) -> Advice:
  """The advice that follows from the measurements."""
  lr = best_rate(list(probe.rates), list(probe.rates.values()), probe.cfg.optim.lr)
  rank = smallest_rank(list(probe.ranks), list(probe.ranks.values()))
  return Advice(lr, fewest_parameters(probe.targets, probe.parameters), rank, float(probe.cfg.lora.alpha or 0))

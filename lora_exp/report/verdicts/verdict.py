"""Which of several settings is enough: the cheapest that is not measurably worse than the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.statistics.estimates import Difference, difference
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, best_of, edges, untuned

TOLERANCE = 0.02  # of the best setting's gain: a smaller difference is none in practice
NOISE = 0.25  # of that gain: where a difference as large cannot be excluded, nothing is said
TEST = (f"the 95 % interval of the difference over seeds (Student's t, paired where both have the seeds) reaches 0, or "
        f"the difference is at most {TOLERANCE * 100:g} % of the best one's gain; each comparison for itself")


@dataclass
class Verdict:
  """What a comparison came to."""

  best: Setting
  chosen: Setting  # the cheapest that is not measurably worse
  against: list[tuple[Setting, Difference]]  # every other setting, and how much worse it is than the best
  tolerance: float  # in the unit of the metric
  doubts: list[str]  # why nothing is concluded
  left_out: list[Setting]  # with fewer than three seeds

  def to_best(self, setting: Setting) -> Difference | None:
    """How much worse it is than the best; None for the best itself."""
    return next((d for s, d in self.against if s is setting), None)


def not_worse(d: Difference, tolerance: float) -> bool:
  """Whether the interval of `d` reaches 0, or `d` is at most the tolerance."""
  return d.mean <= tolerance or (d.half is not None and d.low <= 0)


def tolerance_of(settings: Sequence[Setting]) -> float:
  """TOLERANCE of the gain of the best setting."""
  gain = best_of(settings).gain.mean
  return TOLERANCE * gain if gain > 0 else 0.0


def enough(group: Group, settings: Sequence[Setting], cost: Callable[[Setting], float], key: str) -> Verdict:
  """The cheapest of `settings` that is not measurably worse than the best, and what speaks against saying so.

  `settings` are the best ones for each value of `key`; what else is tuned must not be best on an edge.
  """
  tolerance = tolerance_of(settings)
  doubts = []
  tested = [s for s in settings if s.seeds >= SEEDS_NEEDED]
  if short := [s for s in settings if s.seeds < SEEDS_NEEDED]:
    least = min(s.penalty for s in tested) if tested else math.inf
    if len(tested) < 2 or any(s.penalty < least - tolerance for s in short):
      doubts.append(f"{_few(short)}, and three are needed")
      tested = list(settings)
  best = best_of(tested)
  against = [(s, difference(s.penalties, best.penalties)) for s in tested if s is not best]
  passed = [best, *(s for s, d in against if not_worse(d, tolerance))]
  chosen = min(passed, key=cost)
  gain = best.gain.mean
  noisy = next((d for s, d in against if s is chosen and d.half is not None and d.high > NOISE * gain > 0), None)
  if noisy and noisy.mean > tolerance:
    doubts.append(f"the seeds scatter too much: {chosen.label} may be worse than {best.label} by {noisy.high:.4f}, "
                  f"which is {noisy.high / gain * 100:.0f} % of the gain")
  if best.gain.n and gain <= 0:
    doubts.append(f"no setting is better than the base ({best.label} is the best, "
                  f"{best.gain.text(sign=True)} {best.metric.better_side} it)")
  doubts += [edge for s in settings for edge in edges(group, s, tolerance, key)]
  doubts += untuned(group, settings, key)
  return Verdict(best, chosen, against, tolerance, doubts, [s for s in settings if s not in tested])


def _few(settings: Sequence[Setting]) -> str:
  counts = sorted({s.seeds for s in settings})
  number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
  plural = "" if counts == [1] else "s"
  if len(settings) <= 3:
    return f"{' and '.join(s.label for s in settings)} {'has' if len(settings) == 1 else 'have'} {number} seed{plural}"
  return f"{len(settings)} of the settings have {number} seed{plural}"

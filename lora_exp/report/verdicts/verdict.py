"""Which of several settings is enough: the cheapest that is not measurably worse than the best."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.statistics.estimates import Difference, difference
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, at_edges, best_of, unevenly_tuned

TOLERANCE = 0.02  # share of the best setting's gain; a smaller difference does not matter in practice
NOISE = 0.25  # share of that gain; nothing is concluded where a difference as large cannot be excluded
TEST = (f"the 95 % interval of the difference over seeds (Student's t, paired where both have the seeds) reaches 0, or "
        f"the difference is at most {TOLERANCE * 100:g} % of the best one's gain; each comparison for itself")


@dataclass(frozen=True)
class Verdict:
  """The result of comparing settings."""

  best: Setting
  chosen: Setting  # the cheapest that is not measurably worse
  against: list[tuple[Setting, Difference]]  # every other setting, and how much worse it is than the best
  tolerance: float  # in the unit of the metric
  doubts: list[str]  # why nothing is concluded; empty for a conclusion
  left_out: list[Setting]  # with fewer than three seeds

  def to_best(self, setting: Setting) -> Difference | None:
    """How much worse `setting` is than the best; None for the best itself."""
    return next((d for s, d in self.against if s is setting), None)


def not_worse(d: Difference, tolerance: float) -> bool:
  """Whether the interval of `d` reaches 0, or `d` is at most the tolerance."""
  return d.mean <= tolerance or (d.half is not None and d.low <= 0)


def tolerance_of(settings: Sequence[Setting]) -> float:
  """TOLERANCE of the gain of the best setting, in the unit of the metric."""
  gain = best_of(settings).gain.mean
  return TOLERANCE * gain if gain > 0 else 0.0


def judge(group: Group, settings: Sequence[Setting], cost: Callable[[Setting], float], key: str) -> Verdict:
  """The cheapest of `settings` that is not measurably worse than the best, and what speaks against saying so.

  `settings` are the best ones for each value of `key`. What else is tuned must not be best at an edge.
  """
  tolerance = tolerance_of(settings)
  doubts: list[str] = []
  tested = [s for s in settings if s.seeds >= SEEDS_NEEDED]
  if short := [s for s in settings if s.seeds < SEEDS_NEEDED]:
    lowest = min((s.penalty for s in tested), default=math.inf)
    if len(tested) < 2 or any(s.penalty < lowest - tolerance for s in short):
      doubts.append(f"{_with_few_seeds(short)}, and three are needed")
      tested = list(settings)
  best = best_of(tested)
  against = [(s, difference(s.penalties, best.penalties)) for s in tested if s is not best]
  chosen = min([best, *(s for s, d in against if not_worse(d, tolerance))], key=cost)
  doubts += _too_noisy(best, chosen, next((d for s, d in against if s is chosen), None), tolerance)
  if best.gain.n and best.gain.mean <= 0:
    doubts.append(f"no setting is better than the base ({best.label} is the best, "
                  f"{best.gain.text(sign=True)} {best.metric.better_side} it)")
  doubts += [edge for s in settings for edge in at_edges(group, s, tolerance, key)]
  doubts += unevenly_tuned(group, settings, key)
  left_out = [s for s in settings if not any(s is other for other in tested)]
  return Verdict(best, chosen, against, tolerance, doubts, left_out)


def _too_noisy(best: Setting, chosen: Setting, d: Difference | None, tolerance: float) -> list[str]:
  """Whether `chosen`, which is `d` worse than the best, may be worse by NOISE of the gain or more."""
  gain = best.gain.mean
  if d is None or d.half is None or not d.high > NOISE * gain > 0 or d.mean <= tolerance:
    return []
  return [f"the seeds scatter too much: {chosen.label} may be worse than {best.label} by {d.high:.4f}, "
          f"which is {d.high / gain * 100:.0f} % of the gain"]


def _with_few_seeds(settings: Sequence[Setting]) -> str:
  """Which settings have how many seeds, in words."""
  counts = sorted({s.seeds for s in settings})
  number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
  seeds = f"{number} seed{'' if counts == [1] else 's'}"
  if len(settings) <= 3:
    return f"{' and '.join(s.label for s in settings)} {'has' if len(settings) == 1 else 'have'} {seeds}"
  return f"{len(settings)} of the settings have {seeds}"

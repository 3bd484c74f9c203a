"""Which of several settings are enough: the test behind every verdict of the report, from numbers alone.

Settings are given by their gains over the base, one for each seed (higher is better; NaN for a seed that diverged).
The margin m is a share of the best setting's gain, fixed beforehand. A setting with mean gain g_i is

    sufficient     if it is shown for every other setting j that g_i > (1 − m) · g_j: intersection-union of one-sided
                   tests, each at `level`. It is then less than the margin worse than the best, whichever that is.
    insufficient   if it is shown for one j that g_i < (1 − m) · g_j: Holm's correction over all ordered pairs, at half
                   of `level`, because a sweep that claims both kinds has both chances to be wrong.
    undecided      otherwise.

Each test of sufficiency may be wrong, and a sweep has several: each of several settings just outside the margin has its
own chance to be called sufficient by error. What keeps these chances together below `level` depends on the claims:

    IN_ORDER   settings in an order, such as ranks, are tested from the best outwards: one is sufficient only if those
               between it and the best pass the test too, apart from those shown to be insufficient. This is a fixed
               sequence, but with BETWEEN times the level for those between, which costs less power
    ANY        the level is divided by the number of settings besides the best that are not insufficient (Bonferroni)
    ONE        only one of the settings is in question, so that nothing is corrected

The larger the noise is relative to the margin, the more settings may be called sufficient by error. Therefore the level
of these tests falls, down to half, if the noise exceeds CLOSE of the margin. With more than MANY settings that are not
insufficient, it is divided among them.

The contrast g_i − (1 − m) · g_j is tested as it stands, so that the error of the margin itself is in the test
(`lora_exp.report.verdicts.contrasts`). The constants are measured by tests/bench/verdicts.py.

References: Berger (1982), Multiparameter hypothesis testing and acceptance sampling (intersection-union);
Holm (1979), A simple sequentially rejective multiple test procedure; Maurer, Hothorn and Lehmacher (1995), Multiple
comparisons in drug clinical trials and preclinical assays: a-priori ordered hypotheses (fixed sequence).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np

from lora_exp.config.schema import ReportConfig
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED, Contrasts

SUFFICIENT, INSUFFICIENT, UNDECIDED = "sufficient", "insufficient", "undecided"
ANY, IN_ORDER, ONE = "any", "in_order", "one"  # claims of sufficiency that a sweep may make
MARGIN = ReportConfig.margin  # default share of the best setting's gain
LEVEL = 0.05
BETWEEN = 2  # factor of the level for settings between the tested one and the best
MANY = 5  # settings besides the tested one that are not insufficient; with more of them the level falls

Gains = Mapping[str, Mapping[Any, float]]  # setting -> seed -> gain over the base; NaN where it diverged


@dataclass(frozen=True)
class SettingVerdict:
  """The verdict on one setting."""

  name: str
  state: str  # sufficient | insufficient | undecided
  seeds: int  # that count, diverged ones included
  diverged: int
  gain: float  # mean, adjusted for the seeds that it shares with the others; NaN if every seed diverged
  short: float  # of the best setting's gain, as a share of it; 0 for the best
  worse_than: tuple[str, ...]  # settings compared with which it is shown to be more than the margin worse
  more_seeds: int | None  # further seeds of each setting that would probably decide; None if decided or not known
  open_against: tuple[str, ...] = ()  # settings compared with which it is not shown to be less than the margin worse
  bound: Callable[[], float] | None = field(default=None, compare=False, repr=False)

  @cached_property
  def at_most(self) -> float:
    """The upper bound of `short` at `level`: below the margin if sufficient; inf if nothing is known."""
    return math.inf if self.bound is None else self.bound()


@dataclass(frozen=True)
class Judgement:
  """The verdicts on all settings of one comparison."""

  verdicts: dict[str, SettingVerdict]  # in the order given
  best: str | None  # with the highest mean gain; None if every setting diverged
  margin: float
  level: float
  error: float  # standard deviation of a trial after removing settings and seeds; NaN if unknown
  pooled: bool  # whether one variance serves all settings
  gains_shown: bool  # whether the best setting is shown to be better than the base
  claims: str  # ANY, IN_ORDER or ONE

  def state(self, name: str) -> str:
    return self.verdicts[name].state

  def names(self, state: str) -> list[str]:
    """The settings in one state, in the order given."""
    return [name for name, verdict in self.verdicts.items() if verdict.state == state]


def judge(
  gains: Gains, margin: float = MARGIN, level: float = LEVEL, added: np.ndarray | None = None, claims: str = ANY
) -> Judgement:
  """The verdicts on settings by their gains. `claims`: ANY, IN_ORDER or ONE, see the top of the file.

  `added` is the covariance (S, S) of errors of the settings' means that seeds do not show, such as that of the held-out
  text; it is added in quadrature. Nothing is concluded about, or against, a setting with fewer than SEEDS_NEEDED seeds.
  A setting with a diverged seed is never sufficient or insufficient. The others are compared with its finite seeds.
  This overestimates the setting, so the verdicts on the others are conservative.
  """
  names = list(gains)
  finite = {name: {k: float(g) for k, g in gains[name].items() if math.isfinite(g)} for name in names}
  diverged = {name: len(gains[name]) - len(finite[name]) for name in names}
  fitted = [name for name in names if finite[name]]
  kept = [names.index(name) for name in fitted]
  contrasts = Contrasts([finite[name] for name in fitted], None if added is None else added[np.ix_(kept, kept)])
  eligible = {i for i, name in enumerate(fitted) if diverged[name] == 0 and len(finite[name]) >= SEEDS_NEEDED}
  gains_shown = contrasts.any_gain(level, eligible)
  insufficient = contrasts.insufficient(margin, level / 2, eligible) if gains_shown else {}
  others = max(len(fitted) - len(insufficient) - 1, 1)  # that may be called sufficient besides the best
  chance = level / others if claims == ANY else level * min(1.0, MANY / others)
  best = max(range(len(fitted)), key=lambda i: contrasts.means[i], default=None)
  verdicts = {}
  for name in names:
    if name not in fitted:
      verdicts[name] = SettingVerdict(name, UNDECIDED, diverged[name], diverged[name], math.nan, math.nan, (), None)
      continue
    i = fitted.index(name)
    worse_than = tuple(fitted[j] for j in insufficient.get(i, ()))
    testable = gains_shown and i in eligible and len(fitted) > 1
    comparable = testable and all(diverged[other] or len(finite[other]) >= SEEDS_NEEDED for other in fitted)
    levels = {i: chance}
    if claims == IN_ORDER:
      levels |= dict.fromkeys(_between(i, best, eligible - insufficient.keys()), BETWEEN * chance)
    state = UNDECIDED
    if worse_than:
      state = INSUFFICIENT
    elif comparable and all(contrasts.sufficient(k, margin, at) for k, at in levels.items()):
      state = SUFFICIENT
    top = contrasts.means[best]
    verdicts[name] = SettingVerdict(
      name, state, len(gains[name]), diverged[name], float(contrasts.means[i]),
      float((top - contrasts.means[i]) / top) if top > 0 else math.nan,
      worse_than,
      contrasts.more_seeds(i, margin) if testable and state == UNDECIDED else None,
      tuple(fitted[j] for j in contrasts.open_against(i, margin, chance)),
      partial(_bound, contrasts, levels) if testable else None,
    )
  return Judgement(verdicts, None if best is None else fitted[best], margin, level, contrasts.error, contrasts.pooled,
                   gains_shown, claims)




def _between(i: int, best: int | None, settings: Collection[int]) -> list[int]:
  """Those of `settings` between i and the best."""
  low, high = sorted((i, i if best is None else best))
  return [k for k in range(low + 1, high) if k in settings]


def _bound(contrasts: Contrasts, levels: Mapping[int, float]) -> float:
  """The largest of the upper bounds of how far settings are short of the best, each at its level."""
  return max(contrasts.at_most(k, level) for k, level in levels.items())

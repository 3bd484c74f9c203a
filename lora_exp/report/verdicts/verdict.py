"""The verdicts on the levels of one key, and the reasons why they may not be an answer.

`judge_levels` makes the decisions of the report. It scores each level (`tuning.make_level`), tests the gains
(`judgement.judge`), and collects the doubts that a test of the numbers cannot reveal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_exp.report.estimation.held_out_text import mean_gains_covariance
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import ALPHA, RANK
from lora_exp.report.reading.sweep_ledger import LookLevel
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED, Contrasts
from lora_exp.report.verdicts.judgement import (
  ANY,
  IN_ORDER,
  INSUFFICIENT,
  LEVEL,
  ONE,
  SUFFICIENT,
  UNDECIDED,
  Judgement,
  SettingVerdict,
  judge,
)
from lora_exp.report.verdicts.tuning import Level, at_edges, uneven_tuning

ORDERED = (RANK, ALPHA)  # keys whose values are in an order


@dataclass(frozen=True)
class Verdict:
  """The verdicts on levels, by their labels."""

  levels: list[Level]
  judgement: Judgement
  doubts: list[str]  # why no level may be called enough; empty if one may
  notes: dict[str, str]  # tuned key -> how the tuning of levels differed, which every conclusion must mention
  covers_text: bool  # whether the error of the held-out text is in the tests
  look: LookLevel | None = None  # the last look at the verdicts during the sweep, whose level the tests use

  @property
  def best(self) -> Level:
    """The level with the highest mean gain, among those without a diverged seed if there are any."""
    steady = [level for level in self.levels if not level.diverged] or self.levels
    return max(steady, key=self._gain)

  def of(self, level: Level) -> SettingVerdict:
    return self.judgement.verdicts[level.label]

  def having(self, state: str) -> list[Level]:
    """The levels in one state, in the order of the levels."""
    return [level for level in self.levels if self.of(level).state == state]

  @property
  def sufficient(self) -> list[Level]:
    return self.having(SUFFICIENT)

  @property
  def insufficient(self) -> list[Level]:
    return self.having(INSUFFICIENT)

  @property
  def undecided(self) -> list[Level]:
    return self.having(UNDECIDED)

  def _gain(self, level: Level) -> float:
    gain = self.of(level).gain
    return gain if math.isfinite(gain) else -math.inf


def judge_levels(group: Group, levels: Sequence[Level], key: str) -> Verdict:
  """The verdicts on `levels` of `key`, with the margin of the group, at the level of the sweep's last look or LEVEL."""
  levels, look = list(levels), group.look
  level = LEVEL if look is None else look.level
  text = text_error(levels)
  added = np.diag([lev.choice_variance for lev in levels]) + (0.0 if text is None else text)
  claims = ANY if key not in ORDERED else IN_ORDER
  if look is not None:
    claims = ONE  # a look has one answer, and seeds are added for it alone
  judgement = judge({lev.label: lev.gains for lev in levels}, group.margin, level, added, claims)
  doubts = [*_few_seeds(levels), *_divergence(levels)]
  if not doubts and not judgement.gains_shown:
    doubts.append(_no_gain(judgement))
  doubts += list(dict.fromkeys(edge for lev in levels for edge in at_edges(group, lev.chosen, key)))
  return Verdict(levels, judgement, doubts, uneven_tuning(levels, group.keys, key), text is not None, look)


def text_error(levels: Sequence[Level]) -> np.ndarray | None:
  """The covariance of the mean gains over held-out documents; None unless all runs kept the same documents."""
  return mean_gains_covariance(
    [[run.documents.get(level.chosen.metric.name) for run in level.chosen.counted.values()] for level in levels])


def _few_seeds(levels: Sequence[Level]) -> list[str]:
  """Which levels have too few seeds, in words."""
  few = [level for level in levels if len(level.gains) < SEEDS_NEEDED]
  if not few:
    return []
  counts = sorted({len(level.gains) for level in few})
  number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
  seeds = f"{number} seed{'' if counts == [1] else 's'}"
  if len(few) <= 3:
    labels = [level.label for level in few]
    names = ("; " if any("," in label for label in labels) else " and ").join(labels)
    return [f"{names} {'has' if len(few) == 1 else 'have'} {seeds}, and three are needed{_repeats(few)}"]
  return [f"{len(few)} of the settings have {seeds}, and three are needed{_repeats(few)}"]


def _repeats(levels: Sequence[Level]) -> str:
  return " (identical losses count once)" if any(level.chosen.repeats for level in levels) else ""


def _divergence(levels: Sequence[Level]) -> list[str]:
  return [level.divergence for level in levels if level.diverged]


def _no_gain(judgement: Judgement) -> str:
  gains = [verdict.gain for verdict in judgement.verdicts.values() if math.isfinite(verdict.gain)]
  if not gains or max(gains) <= 0:
    return "no setting is better than the base"
  return "nothing is known, because the noise between seeds is larger than the gain"


def shown_front(settings: Sequence[Setting]) -> list[Setting]:
  """The Pareto front by trainable parameters: a larger setting is on it only where it is shown to be better.

  Each candidate is tested against every cheaper setting (one-sided, 5 %). The cheapest is always on it.
  """
  known = sorted((s for s in settings if s.trainable and s.seeds and not s.diverged), key=_cost)
  front: list[Setting] = known[:1]
  for i, setting in enumerate(known[1:], 1):
    tables = [s.gains for s in [*known[:i], setting]]
    if min(map(len, tables)) >= SEEDS_NEEDED and is_better_than_each(tables):
      front.append(setting)
  return front


def is_better_than_each(gains: Sequence[Mapping[Any, float]]) -> bool:
  """Whether the last of the settings is shown to gain more than each of the others."""
  names = [str(i) for i in range(len(gains))]
  judged = judge(dict(zip(names, gains, strict=True)), margin=0.0, claims=ONE)
  return judged.state(names[-1]) == SUFFICIENT


def shown_lower(values: Sequence[Mapping[Any, float]], level: float = LEVEL) -> set[tuple[int, int]]:
  """(i, j) where the values of i, by seed, are shown to be lower than those of j: Holm over all ordered pairs.

  A setting with fewer than SEEDS_NEEDED seeds is in no pair. All values must be finite.
  """
  eligible = {i for i, by_seed in enumerate(values) if len(by_seed) >= SEEDS_NEEDED}
  shown = Contrasts(values).insufficient(0.0, level, eligible)
  return {(i, j) for i, higher in shown.items() for j in higher}


def _cost(setting: Setting) -> float:
  return float(setting.trainable or 0)

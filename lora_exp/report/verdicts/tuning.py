"""Tuned keys such as the learning rate: which value is best, scored on seeds that did not choose it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from lora_exp.config.number_ranges import RANGES
from lora_exp.report.estimation.estimates import Estimate, estimate, t_quantile
from lora_exp.report.grouping.group import Group, sort_key
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import key_value, short_name, value_text
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED, Contrasts
from lora_exp.report.verdicts.judgement import LEVEL

VALUES_NEEDED = 3  # of a tuned key, where each setting was tried at its own values
CONTENDS = 0.02  # one-sided p below which a value is no longer taken for one that may be the best
EQUAL_CHOICE = 0.65  # weight of the variance of a choice between equal values, from tests/bench/verdicts.py
SHORTFALL = 0.62  # weight of the shortfall of leave-one-out choices from the final one, from tests/bench/verdicts.py
# Keys that are tuned: settings are compared at their own best value of each.
TUNED = ("optim.", "lora.alpha", "lora.lr_ratio", "lora.dropout", "lora.init_std", "train.batch_size")


@dataclass(frozen=True)
class Level:
  """One value of the key under comparison, at the best values of what was tuned for it."""

  value: Any  # of the key
  chosen: Setting  # the best of `candidates` by all seeds
  candidates: list[Setting]  # the settings of this level, one for each combination of tuned values
  gains: dict[Any, float]  # seed -> gain of the values chosen without this seed; NaN where it diverged
  choice_variance: float = 0.0  # of the mean gain, because the choice itself may have fallen otherwise
  choice_df: float = 1.0  # degrees of freedom of that

  @property
  def label(self) -> str:
    return self.chosen.label

  @property
  def gain(self) -> Estimate:
    """The mean gain over seeds that did not diverge; its interval includes the error of the choice."""
    values = [gain for gain in self.gains.values() if math.isfinite(gain)]
    plain = estimate(values)
    if plain.half is None or not self.choice_variance:
      return plain
    own, choice = (plain.half / plain.t) ** 2, self.choice_variance
    df = (own + choice) ** 2 / (own**2 / (plain.n - 1) + choice**2 / self.choice_df)  # Satterthwaite
    half = t_quantile(df) * math.sqrt(own + choice)
    return Estimate(plain.mean, max(half, plain.half), plain.n)

  @property
  def diverged(self) -> int:
    """The number of its seeds that diverged."""
    return sum(not math.isfinite(gain) for gain in self.gains.values())

  @property
  def divergence(self) -> str:
    """Such as `rank 4 diverged in 1 of 3`; empty if no seed diverged."""
    return f"{self.label} diverged in {self.diverged} of {len(self.gains)}" if self.diverged else ""


def is_tuned(key: str) -> bool:
  return key.startswith(TUNED)


def contexts(group: Group, key: str, ignore: Iterable[str] = ()) -> list[tuple[str, list[Setting]]]:
  """(words, settings) for each combination of the keys that are neither `key`, nor tuned, nor in `ignore`.

  Combinations in which `key` has a single value are left out.
  """
  fixed = [k for k in group.keys if k != key and not is_tuned(k) and k not in set(ignore)]
  found: dict[tuple, list[Setting]] = {}
  for setting in group.tried:
    if key in setting.values:
      found.setdefault(tuple((k, setting.values.get(k)) for k in fixed), []).append(setting)
  return [(context_words(values, settings), settings) for values, settings in found.items()
          if len({repr(s.values[key]) for s in settings}) > 1 and any(s.seeds for s in settings)]


def context_words(values: Iterable[tuple[str, Any]], settings: Sequence[Setting]) -> str:
  """The values that `settings` share, in words, without keys that none of them uses."""
  return ", ".join(key_value(key, value) for key, value in values if any(key in s.values for s in settings))


def best_of(settings: Iterable[Setting]) -> Setting:
  """The best setting by the tuning half: of those without a diverged seed, those with SEEDS_NEEDED seeds or the most.

  Settings are compared on the seeds that all of those have, if there are any.
  """
  settings = list(settings)
  steady = [s for s in settings if s.seeds and not s.diverged] or [s for s in settings if s.seeds] or settings
  seeds = min(SEEDS_NEEDED, max(s.seeds for s in steady))
  candidates = [s for s in steady if s.seeds >= seeds]
  if not seeds:
    return min(candidates, key=_failures)
  tables = [s.tuning_penalties for s in candidates]
  return candidates[_lowest(tables, set().union(*tables))]


def best_by(settings: Iterable[Setting], key: str) -> dict[Any, Setting]:
  """Value of `key` -> its best setting, by value."""
  by_value: dict[Any, list[Setting]] = {}
  for setting in settings:
    by_value.setdefault(setting.values[key], []).append(setting)
  return {value: best_of(by_value[value]) for value in sorted(by_value, key=sort_key)}


def levels_of(settings: Iterable[Setting], key: str) -> list[Level]:
  """The levels of `key`, by value."""
  by_value: dict[Any, list[Setting]] = {}
  for setting in settings:
    by_value.setdefault(setting.values[key], []).append(setting)
  return [make_level(value, by_value[value]) for value in sorted(by_value, key=sort_key)]


def make_level(value: Any, settings: Sequence[Setting]) -> Level:
  """Chooses between settings, and scores the choice by leaving out one seed at a time.

  Each seed is scored at the values that the other seeds choose, on the tuning half of the held-out documents if there
  is one. Seeds with which more values were tried than with the rest were used only for the choice and are not scored.
  """
  chosen = best_of(settings)
  steady = [s for s in settings if s.seeds and not s.diverged]
  if len(steady) < 2:
    return Level(value, chosen, list(settings), chosen.gains)
  seeds = _scoring_seeds(steady)
  gains = {seed: _left_out_gain(steady, seed) for seed in seeds}
  return Level(value, chosen, list(settings), gains, *_choice_variance(steady, chosen, gains))


def _scoring_seeds(settings: Sequence[Setting]) -> list[tuple]:
  """The seeds with which no more values were tried than with most seeds; all seeds if those are too few."""
  gains = [s.gains for s in settings]
  every = list(dict.fromkeys(seed for by_seed in gains for seed in by_seed))
  most = max(map(len, gains))
  finalists = [len(by_seed) == most for by_seed in gains]
  scoring = [seed for seed in every
             if all(final for by_seed, final in zip(gains, finalists, strict=True) if seed in by_seed)]
  return scoring if len(scoring) >= min(SEEDS_NEEDED, len(every)) else every


def _left_out_gain(settings: Sequence[Setting], seed: tuple) -> float:
  """The gain at `seed` of the setting that the other seeds choose."""
  present = [s for s in settings if seed in s.gains]
  tables = [{k: v for k, v in s.tuning_penalties.items() if k != seed} for s in present]
  if not any(tables):  # a single seed: choice and score share it
    return max(s.gains[seed] for s in present)
  known = [(s, table) for s, table in zip(present, tables, strict=True) if table]
  best = _lowest([table for _, table in known], set().union(*(table for _, table in known)))
  return known[best][0].gains[seed]


def _lowest(tables: Sequence[Mapping[tuple, float]], seeds: set[tuple]) -> int:
  """Index of the table with the lowest mean over the seeds that all have, or else over its own."""
  shared = [seed for seed in seeds if all(seed in table for table in tables)]
  means = [float(np.mean([table[k] for k in (shared or table)])) if table else math.inf for table in tables]
  return int(np.argmin(means))


def _choice_variance(
  settings: Sequence[Setting], chosen: Setting, scores: Mapping[tuple, float]
) -> tuple[float, float]:
  """The variance that the choice adds to the mean of `scores`, and its degrees of freedom.

  One part is the variance of a choice between the values that may be best, as if they were equal. The other is the
  square of the shortfall of the leave-one-out choices, whose scores may be those of other values than the final one.
  """
  tables = [{k: g for k, g in s.gains.items() if k in scores} for s in settings]
  contrasts = Contrasts([table for table in tables if table])
  if contrasts.count < 2 or contrasts.df < 1:
    return 0.0, 1.0
  best, seeds = int(np.argmax(contrasts.means)), len(scores)
  contending = 1 + sum(contrasts.p_pooled(best, j) >= CONTENDS for j in range(contrasts.count) if j != best)
  equal = EQUAL_CHOICE * choice_inflation(contending, seeds) * contrasts.variance / seeds
  shortfalls = [chosen.gains.get(seed, math.nan) - gain for seed, gain in scores.items()]
  shortfall = SHORTFALL * float(np.mean([x for x in shortfalls if math.isfinite(x)] or [0.0]))
  return equal + shortfall**2, float(contrasts.df)


@cache
def choice_inflation(values: int, seeds: int, draws: int = 4000) -> float:
  """By how much leave-one-seed-out choice between equal values raises the variance of the mean, as a share of it.

  The scores of different seeds are correlated, because each seed takes part in the choice for the others. Simulated.
  """
  if values < 2 or seeds < 2:
    return 0.0
  scores = np.random.default_rng(0).standard_normal((draws, values, seeds))
  others = (scores.sum(2, keepdims=True) - scores) / (seeds - 1)
  picked = np.take_along_axis(scores, others.argmin(1)[:, None], axis=1)
  return max(float(picked.mean(2).var() * seeds) - 1, 0.0)


def uneven_tuning(levels: Sequence[Level], keys: Iterable[str], ignore: str) -> dict[str, str]:
  """Tuned key (but `ignore`) of which the levels were not tried at equally many or at enough values -> a phrase."""
  notes = {}
  for key in keys:
    if not is_tuned(key) or key == ignore:
      continue
    tried = {level.label: {repr(s.values[key]) for s in level.candidates if key in s.values} for level in levels}
    counts = {label: len(values) for label, values in tried.items() if values}
    if not counts:
      continue
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    name = short_name(key)
    if counts[fewest] < counts[most]:
      few = f"at its only {name}" if counts[fewest] == 1 else f"at {counts[fewest]} values of {name}"
      notes[key] = f"{fewest} was tried {few}, {most} at {counts[most]}"
    elif counts[fewest] < VALUES_NEEDED and any(tried[label] != tried[fewest] for label in counts):
      notes[key] = (f"each was tried at its own values of {name}, which were as few as {counts[fewest]}, and "
                    f"{VALUES_NEEDED} are needed to find a best one")
  return notes


def is_tuned_for_each(levels: Sequence[Level], key: str) -> bool:
  """Whether every level was tried at VALUES_NEEDED values of `key` or more."""
  return all(len({repr(s.values[key]) for s in level.candidates if key in s.values}) >= VALUES_NEEDED
             for level in levels)


def at_edges(group: Group, setting: Setting, ignore: str = "") -> list[str]:
  """Tuned keys (but `ignore`) whose best value is the lowest or highest tried.

  A value does not count as an edge if no lower one is allowed, such as dropout 0. Nor does it if its neighbour is shown
  to be worse by less than the margin, because the metric is flat there.
  """
  problems = []
  for key, value in setting.values.items():
    if not is_tuned(key) or key == ignore:
      continue
    line = {s.values[key]: s for s in reversed(_line(group, setting, key)) if isinstance(s.values[key], int | float)}
    values = sorted(line)
    if len(values) < 2 or value not in (values[0], values[-1]):
      continue
    lowest = value == values[0]
    if lowest and _is_least(key, value):
      continue
    neighbour = line[values[1] if lowest else values[-2]]
    if not _is_flat(setting, neighbour, group.margin):
      others = {k: v for k, v in setting.values.items() if k != key}
      of = f" of {', '.join(key_value(k, v) for k, v in others.items())}" if others else ""
      problems.append(f"the best {short_name(key)}{of} is the {'lowest' if lowest else 'highest'} tried "
                      f"({short_name(key)} {value_text(value)})")
  return problems


def _is_least(key: str, value: float) -> bool:
  """Whether `value` is the lowest that the setting may have."""
  allowed = RANGES.get(key)
  return allowed is not None and allowed.low_included and value == allowed.low


def _is_flat(setting: Setting, neighbour: Setting, margin: float) -> bool:
  """Whether the neighbour is shown to be less than the margin worse, which tuning trials cannot show."""
  tables = [s.gains for s in (neighbour, setting)]
  if any(len(table) < SEEDS_NEEDED or not all(map(math.isfinite, table.values())) for table in tables):
    return False
  return Contrasts(tables).p_value(0, 1, margin) < LEVEL


def _line(group: Group, setting: Setting, key: str) -> list[Setting]:
  """The settings that differ from `setting` in `key` at most."""
  others = _without(setting.values, key)
  return [s for s in group.settings if key in s.values and _without(s.values, key) == others]


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
  return {k: v for k, v in values.items() if k != key}


def _failures(setting: Setting) -> int:
  return len(setting.diverged)

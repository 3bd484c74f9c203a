"""When a sweep has enough seeds: verdicts after 3, 5, 7, … seeds, at a level that is shared between these looks.

    look -> drop what is insufficient -> stop if the answer is known, else add seeds to what is left -> look -> …

The answer is known when a setting is sufficient and every setting with fewer trainable parameters is insufficient or
has a diverged seed. A setting with a diverged seed is compared with the seeds that it has, and gets no more.

After a share t of the seeds, the part t^2.5 of the level is spent. Each look is tested at the part that it adds, so
that by the union bound all looks together are wrong with at most `level`, whatever the dependence between them.

Reference: Kim and DeMets (1987), Design and analysis of group sequential tests based on the type I error spending rate
function (power family).
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.report.reading.document_losses import DocumentLosses
from lora_exp.report.statistics.held_out_text import text_covariance
from lora_exp.report.verdicts.judgement import INSUFFICIENT, SUFFICIENT, Judgement, judge
from lora_exp.sweep.round_plan import SCORE, Decision, RoundPlan, RoundResult, RoundTrial

SPENDING_POWER = 2.5  # chosen with tests/bench/decide.py: clear cases end early, and the last look keeps its power


@dataclass(frozen=True)
class Look:
  """The verdicts after a number of seeds. Settings are indices in `RoundPlan.settings`."""

  seeds: int
  level: float  # at which this look tests
  judgement: Judgement  # by index as text
  left: list[int]  # settings that get further seeds unless the sweep stops
  dropped: list[int]  # found insufficient at this or an earlier look
  answer: int | None  # the sufficient setting with the fewest parameters; None if none is known
  decided: bool


def look_levels(looks: Sequence[int], level: float) -> list[float]:
  """The part of `level` that each look may spend. The parts sum to `level`."""
  spent = level * (np.array(looks) / looks[-1]) ** SPENDING_POWER
  return [float(part) for part in np.diff(spent, prepend=0.0)]


def make_looks(
  plan: RoundPlan, decision: Decision, margin: float, trials: Sequence[RoundTrial], results: Mapping[int, RoundResult]
) -> list[Look]:
  """The looks that the scored trials so far allow, in order."""
  gains, sizes = _scores(plan, trials, results)
  documents = {(t.setting, t.seed): results[t.number].documents for t in trials if t.purpose == SCORE}
  left, diverged = list(gains), []
  looks: list[Look] = []
  for count, level in zip(decision.looks, look_levels(decision.looks, decision.level), strict=True):
    if not left or any(len(gains[n]) < count for n in left):
      break
    compared = {n: gains[n] for n in gains if n in left or n in diverged}
    text = _text_error(compared, documents, count)
    look = _look(count, level, margin, compared, text, sizes, looks[-1].dropped if looks else [])
    looks.append(look)
    if look.decided:
      break
    left, diverged = look.left, [n for n in compared if look.judgement.verdicts[str(n)].diverged]
  return looks


def _look(
  count: int, level: float, margin: float, gains: Mapping[int, Mapping[int, float]], text: np.ndarray | None,
  sizes: Mapping[int, float], dropped: Sequence[int],
) -> Look:  # fmt: skip
  """The verdicts on the settings in `gains` by their first `count` seeds."""
  first: dict[str, dict[Hashable, float]] = {
    str(n): {seed: gain for seed, gain in by_seed.items() if seed < count} for n, by_seed in gains.items()
  }
  judgement = judge(first, margin, level, text)
  insufficient = [int(name) for name in judgement.names(INSUFFICIENT)]
  sufficient = [int(name) for name in judgement.names(SUFFICIENT)]
  diverged = [n for n in gains if judgement.verdicts[str(n)].diverged]
  left = [n for n in gains if n not in insufficient and n not in diverged]
  answer = min(sufficient, key=sizes.__getitem__, default=None)
  if len(left) == 1 and not diverged and (insufficient or dropped):
    answer = left[0]  # every other is more than the margin worse than one of the settings, and so is not the best
  smaller = [n for n in left if answer is not None and sizes[n] < sizes[answer]]
  return Look(count, level, judgement, left, [*dropped, *insufficient], answer, answer is not None and not smaller)


def _text_error(
  gains: Mapping[int, Mapping[int, float]], documents: Mapping[tuple[int, int], DocumentLosses | None], count: int
) -> np.ndarray | None:
  """The covariance of the mean gains over held-out documents; None unless all runs kept the same documents."""
  known: list[list[DocumentLosses]] = []
  for n, by_seed in gains.items():
    of_setting = [documents.get((n, seed)) for seed, gain in by_seed.items() if seed < count and math.isfinite(gain)]
    known.append([losses for losses in of_setting if losses is not None])
    if not of_setting or len(known[-1]) < len(of_setting):
      return None
  tokens = known[0][0].tokens
  if any(not np.array_equal(losses.tokens, tokens) for of_setting in known for losses in of_setting):
    return None
  return text_covariance([np.mean([d.base - d.exported for d in of_setting], axis=0) for of_setting in known], tokens)


def _scores(
  plan: RoundPlan, trials: Sequence[RoundTrial], results: Mapping[int, RoundResult]
) -> tuple[dict[int, dict[int, float]], dict[int, float]]:
  """Gains by seed for each compared setting without failed trials, and trainable parameters by setting."""
  gains: dict[int, dict[int, float]] = {}
  sizes: dict[int, float] = {}
  failed = set()
  for trial in trials:
    result = results.get(trial.number, RoundResult())
    if trial.purpose == SCORE and plan.settings[trial.setting].compared:
      if result.gain is None:
        failed.add(trial.setting)
      else:
        gains.setdefault(trial.setting, {})[trial.seed] = result.gain
    if result.trainable is not None:
      sizes[trial.setting] = result.trainable
  kept = {n: by_seed for n, by_seed in sorted(gains.items()) if n not in failed}
  return kept, {n: sizes.get(n, math.inf) for n in range(len(plan.settings))}

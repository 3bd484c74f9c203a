"""When a sweep has enough seeds: verdicts after 3, 4, 5, … seeds, at a level that is shared between these looks.

    look -> stop if there is an answer, or if one is improbable; else add seeds where it is open -> look -> …

The candidate is the setting with the fewest trainable parameters of those that are not insufficient. It is the answer
if it is sufficient. Further seeds go to the settings that may become the answer, and to those needed for an undecided
comparison. The other settings cannot change the answer. A setting with a diverged seed, or with seeds that give
identical losses, gets no further seeds and is compared on those that it has. A setting that was dropped during training
gets no verdict.

Each look judges all seeds so far (`lora_exp.report.verdicts.judgement`) at its own level (`look_levels`), as the report
does afterwards. The probability that any look falsely claims that a setting is sufficient is at most the level of the
sweep. Stopping without an answer makes no claim.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lora_exp.report.estimation.held_out_text import mean_gains_covariance
from lora_exp.report.reading.document_losses import DocumentLosses
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.judgement import INSUFFICIENT, ONE, SUFFICIENT, Judgement, judge
from lora_exp.sweep.rounds.futility import chance_of_answer
from lora_exp.sweep.rounds.look_levels import look_levels
from lora_exp.sweep.rounds.round_plan import SCORE, Decision, RoundPlan, RoundResult, RoundTrial

FUTILE = 0.1  # probability of an answer, times the share of the seeds so far, below which no more seeds are trained

Gains = dict[int, dict[int, float]]  # setting -> seed -> gain


@dataclass(frozen=True)
class Look:
  """The verdicts after a number of seeds. Settings are indices in `RoundPlan.settings`."""

  seeds: int
  level: float  # at which this look tests
  judgement: Judgement  # by index as text
  open_settings: list[int]  # settings that get further seeds unless the sweep stops
  insufficient: list[int]
  unjudged: list[int]  # settings that were dropped during training
  answer: int | None  # the sufficient setting with the fewest parameters of those that are not insufficient
  chance: float  # probability of an answer if all seeds of the last look were trained
  futile: bool  # whether this is too low for further seeds

@dataclass(frozen=True)
class Scores:
  """The results of the scored trials, by compared setting."""

  gains: Gains = field(default_factory=dict)  # NaN for a diverged seed; identical losses count once
  trained: dict[int, int] = field(default_factory=dict)  # number of seeds, including identical losses
  sizes: dict[int, float] = field(default_factory=dict)  # trainable parameters
  documents: dict[tuple[int, int], DocumentLosses | None] = field(default_factory=dict)  # by setting and seed
  dropped: list[int] = field(default_factory=list)  # settings that were dropped during training

  def until(self, count: int) -> Gains:
    """The gains of the first `count` seeds."""
    return {n: {seed: gain for seed, gain in by_seed.items() if seed < count} for n, by_seed in self.gains.items()}

  def documents_of(self, gains: Gains) -> list[list[DocumentLosses | None]]:
    """The losses of the documents of each setting in `gains`, for the seeds that did not diverge."""
    return [[self.documents.get((n, seed)) for seed, gain in by_seed.items() if math.isfinite(gain)]
            for n, by_seed in gains.items()]

  def repeats(self, setting: int) -> bool:
    """Whether several seeds of the setting have the same loss, so that further seeds add no information."""
    return len(self.gains[setting]) < self.trained[setting]


def make_looks(
  plan: RoundPlan, decision: Decision, margin: float, trials: Sequence[RoundTrial], results: Mapping[int, RoundResult]
) -> list[Look]:
  """The looks that the scored trials so far allow, in order."""
  scores = read_scores(plan, trials, results)
  open_settings, looks = list(scores.gains), list[Look]()
  levels = look_levels(decision.looks, decision.level)
  for count, level in zip(decision.looks, levels, strict=True):
    if not open_settings or any(scores.trained[n] < count for n in open_settings):
      break
    looks.append(_look(count, level, levels[-1], decision.looks[-1], margin, scores))
    open_settings = [] if looks[-1].futile else looks[-1].open_settings
  return looks


def _look(count: int, level: float, last_level: float, most: int, margin: float, scores: Scores) -> Look:
  """The look at the first `count` seeds of each setting. `most`, `last_level`: seeds and level of the last look."""
  gains = scores.until(count)
  text = mean_gains_covariance(scores.documents_of(gains))
  judgement = judge({str(n): by_seed for n, by_seed in gains.items()}, margin, level, text, ONE)
  insufficient = [int(name) for name in judgement.names(INSUFFICIENT)]
  by_size = sorted((n for n in gains if n not in insufficient), key=scores.sizes.__getitem__)
  steady = [n for n in by_size if not judgement.verdicts[str(n)].diverged]
  answer = next((n for n in steady[:1] if judgement.state(str(n)) == SUFFICIENT), None)
  unknown = any(scores.repeats(n) and len(gains[n]) < SEEDS_NEEDED for n in gains)  # a setting can never be compared
  open_settings = [] if answer is not None or unknown or count == most else _open_settings(steady, judgement)
  open_settings = [n for n in open_settings if not scores.repeats(n)]
  chance = float(answer is not None)
  if open_settings:
    chance = chance_of_answer(judgement, gains, scores.sizes, most, last_level, text)
  futile = bool(open_settings) and chance < FUTILE * count / most  # early means are the least certain
  return Look(count, level, judgement, open_settings, insufficient, scores.dropped, answer, chance, futile)


def _open_settings(steady: Sequence[int], judgement: Judgement) -> list[int]:
  """The settings that get further seeds. `steady`: those that may be the answer, by number of parameters.

  The first setting whose mean is within the margin gets seeds together with those with which its comparison is open.
  Smaller settings get seeds because they must be shown insufficient, and so does the best setting, against which that
  is shown with the fewest seeds.
  """
  verdicts = [judgement.verdicts[str(n)] for n in steady]
  gains = [verdict.gain for verdict in verdicts]
  likely = next((i for i, verdict in enumerate(verdicts) if not verdict.short > judgement.margin), len(steady) - 1)
  if likely < 0:
    return []
  chosen = {*steady[: likely + 1]}
  if verdicts[likely].state != SUFFICIENT:
    chosen |= {int(name) for name in verdicts[likely].open_against if not judgement.verdicts[name].diverged}
  if likely > 0:
    chosen.add(steady[gains.index(max(gains))])
  return sorted(chosen)


def read_scores(plan: RoundPlan, trials: Sequence[RoundTrial], results: Mapping[int, RoundResult]) -> Scores:
  """The scores of the compared settings, except for settings with a trial that failed or was dropped."""
  scores = Scores(sizes=dict.fromkeys(range(len(plan.settings)), math.inf))
  without, losses = set[int](), set[tuple[int, float]]()
  for trial in trials:
    n, result = trial.setting, results.get(trial.number, RoundResult())
    if result.trainable is not None:
      scores.sizes[n] = result.trainable
    if trial.purpose != SCORE or not plan.settings[n].compared:
      continue
    if result.dropped and n not in scores.dropped:
      scores.dropped.append(n)
    if result.gain is None:
      without.add(n)
      continue
    scores.trained[n] = scores.trained.get(n, 0) + 1
    by_seed = scores.gains.setdefault(n, {})
    if result.loss is None or (n, result.loss) not in losses:
      by_seed[trial.seed] = result.gain
      scores.documents[n, trial.seed] = result.documents
      losses |= set() if result.loss is None else {(n, result.loss)}
  for n in without:
    scores.gains.pop(n, None)
    scores.trained.pop(n, None)
  return scores

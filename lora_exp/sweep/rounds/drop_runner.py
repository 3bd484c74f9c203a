"""Trains the trials of a round to an early step, and drops the settings that `early_drop` chooses there."""

import math
from collections.abc import Sequence

from lora_exp.config.metrics import Metric
from lora_exp.runtime import console
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.early_drop import Prediction, drops, gain_curve, predict
from lora_exp.sweep.rounds.next_round import RoundMaker
from lora_exp.sweep.rounds.round_ledger import RoundLedger
from lora_exp.sweep.rounds.round_plan import SCORE, Round, RoundTrial
from lora_exp.sweep.rounds.round_results import read_results


class DropRunner:
  """Drops settings of a sweep before their trials end."""

  def __init__(self, maker: RoundMaker, metric: Metric, runs: LaunchedRuns, ledger: RoundLedger):
    self.maker, self.metric, self.runs, self.ledger = maker, metric, runs, ledger
    self.settings = maker.plan.settings

  def train(self, earlier: Sequence[RoundTrial], current: Round) -> None:
    """Trains the first scoring trials to an early step, and drops settings that will be far short of the best.

    Does nothing if the final gain cannot be predicted from the trials of earlier rounds.
    """
    compared = [trial for trial in current.trials if self.settings[trial.setting].compared]
    prediction = self._prediction(earlier, compared)
    if prediction is None:
      return
    jobs = {trial.number: trial.overrides for trial in current.trials}
    self.runs.train(jobs, [trial.number for trial in compared], prediction.step)
    if self.runs.stopped():
      return
    margin = self.maker.margin
    for setting, drop in drops(self._early_gains(compared, prediction.step), prediction, margin).items():
      self._drop(setting, [*earlier, *compared], drop.reason(prediction, margin))

  def _prediction(self, earlier: Sequence[RoundTrial], compared: Sequence[RoundTrial]) -> Prediction | None:
    """The prediction of final gains from the trials of earlier rounds; None if the round drops no settings."""
    decision = self.maker.plan.decision
    if decision is None or decision.early is None or not any(trial.purpose == SCORE for trial in compared):
      return None
    known = [self.runs.read(trial.number) for trial in earlier if self.settings[trial.setting].compared]
    prediction = predict(known, self.metric, decision.early)
    if prediction is None or self.maker.looks(earlier, read_results(self.runs, earlier, self.metric)):
      return None
    return prediction

  def _early_gains(self, trials: Sequence[RoundTrial], step: int) -> dict[int, list[float]]:
    """The gains at `step` by setting, except for settings with a trial that has not reached it."""
    gains: dict[int, list[float]] = {}
    for trial in trials:
      curve = gain_curve(self.runs.read(trial.number), self.metric)
      gains.setdefault(trial.setting, []).append(curve.get(step, math.nan))
    return {n: known for n, known in gains.items() if all(map(math.isfinite, known))}

  def _drop(self, setting: int, trials: Sequence[RoundTrial], reason: str) -> None:
    """Marks the unfinished trials of a setting as pruned, and records that it was dropped."""
    numbers = [trial.number for trial in trials if trial.setting == setting]
    for number in numbers:
      self.runs.prune(self.runs.read(number), reason)
    label = self.settings[setting].label
    self.ledger.add_drop(label, numbers, reason)
    console.show(f"Dropped {label}: {reason}.")

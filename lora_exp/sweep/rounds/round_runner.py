"""A sweep in rounds: trains a round, chooses the next one from the results, and repeats this until there is none.

A continued sweep trains the recorded rounds unchanged (`RoundLedger`) and chooses only the rounds after them.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from lora_exp.config.errors import DONE, DivergedError
from lora_exp.config.metrics import Metric
from lora_exp.runtime import console
from lora_exp.runtime.locks import run_lock
from lora_exp.sweep.ledger import Outcome
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.early_drop import drops, gain_curve, predict
from lora_exp.sweep.rounds.next_round import Results, RoundMaker
from lora_exp.sweep.rounds.round_ledger import RoundLedger
from lora_exp.sweep.rounds.round_plan import SCORE, TUNE, Round, RoundPlan, RoundTrial
from lora_exp.sweep.rounds.round_results import round_result
from lora_exp.sweep.rounds.round_table import show_answer, show_costs, show_look, show_round, show_time, show_tuning


class RoundRunner:
  """Trains the rounds of a sweep. `defaults`: the default of the tuned setting in each setting of the plan."""

  def __init__(
    self, plan: RoundPlan, defaults: Sequence[float | None], metric: Metric, margin: float, runs: LaunchedRuns
  ):
    self.plan, self.metric, self.runs = plan, metric, runs
    self.maker = RoundMaker(plan, defaults, margin)
    self.rounds = RoundLedger(plan, runs)

  def train(self) -> dict[int, Outcome]:
    """Trains the sweep, or the rest of it. Returns how each run ended, by number.

    Raises InputError if the directory contains a sweep with other settings, InUseError if another process works on it.
    """
    with run_lock(self.runs.directory):
      self.rounds.check_plan()
      rounds = self.rounds.recorded()
      for number, recorded in enumerate(rounds):
        self._train_round(number, recorded)
      spent = ""
      while not self.runs.stopped():
        following = self._next(rounds)
        if following is None:
          break
        spent = self._over_budget(_trials(rounds), following)
        if spent:
          break
        self.rounds.add(len(rounds), following)
        rounds.append(following)
        self._train_round(len(rounds) - 1, following)
      if not self.runs.stopped():
        self._show_end(_trials(rounds), spent)
      return self._outcomes(_trials(rounds))

  def examples(self) -> dict[int, list[str]]:
    """The overrides of a recorded trial of each setting, by number; {} for a new sweep."""
    first: dict[int, RoundTrial] = {}
    for trial in _trials(self.rounds.recorded()):
      first.setdefault(trial.setting, trial)
    return {trial.number: trial.overrides for trial in first.values()}

  def _train_round(self, number: int, current: Round) -> None:
    """Trains a round and shows what it found. Does nothing if a signal stopped the sweep."""
    if self.runs.stopped():
      return
    show_round(number, current)
    jobs = {trial.number: trial.overrides for trial in current.trials}
    started, ended = time.monotonic(), {trial for trial in jobs if self.runs.ledger.ended(trial)}
    earlier = _trials(self.rounds.recorded()[:number])
    self._train_to_prediction(earlier, current)
    if self.runs.stopped():
      return
    self.runs.train(jobs, self._remaining(current), repeat_failed=self.plan.repeat_failed)
    if self.runs.stopped():
      return
    if len(ended) < len(jobs):
      self.rounds.add_seconds(number, time.monotonic() - started)
    trials = [*earlier, *current.trials]
    show_time(len(trials), self.rounds.seconds(), self.maker.known_trials(trials))
    results = self._results(trials)
    if any(trial.purpose == TUNE for trial in current.trials):
      show_tuning(self.plan, trials, results, self.metric)
    looks = self.maker.looks(trials, results)
    if looks:
      self.rounds.add_looks(looks)
      show_look(self.plan, looks[-1])

  def _train_to_prediction(self, earlier: Sequence[RoundTrial], current: Round) -> None:
    """Trains the first scoring trials to an early step, and drops settings that will be far short of the best.

    Does nothing if the final gain cannot be predicted from the trials of earlier rounds.
    """
    decision, compared = self.plan.decision, [t for t in current.trials if self.plan.settings[t.setting].compared]
    if decision is None or decision.early is None or not any(trial.purpose == SCORE for trial in compared):
      return
    known = [self.runs.read(trial.number) for trial in earlier if self.plan.settings[trial.setting].compared]
    prediction = predict(known, self.metric, decision.early)
    if prediction is None or self.maker.looks(earlier, self._results(earlier)):
      return
    self.runs.train({t.number: t.overrides for t in current.trials}, [t.number for t in compared], prediction.step)
    if self.runs.stopped():
      return
    for setting, drop in drops(self._early_gains(compared, prediction.step), prediction, self.maker.margin).items():
      self._drop(setting, [*earlier, *compared], drop.reason(prediction, self.maker.margin))

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
    label = self.plan.settings[setting].label
    self.rounds.add_drop(label, numbers, reason)
    console.show(f"Dropped {label}: {reason}.")

  def _remaining(self, current: Round) -> list[int]:
    """The trials of a round that were not dropped."""
    ledger = self.runs.ledger
    return [trial.number for trial in current.trials if ledger.state(trial.number) != "pruned"]

  def _over_budget(self, trials: Sequence[RoundTrial], following: Round) -> str:
    """Which limit of the budget the next round would exceed, in words; empty for none."""
    budget, results = self.plan.budget, self._results(trials)
    count = len(trials) + len(following.trials)
    longest = max((result.steps for result in results.values()), default=0)
    steps = sum(result.steps for result in results.values()) + longest * len(following.trials)
    minutes = self.rounds.seconds() / 60 * (1 + len(following.trials) / max(len(trials), 1))
    needs = (("trials", budget.trials, count), ("steps", budget.steps, steps), ("minutes", budget.minutes, minutes))
    return "; ".join(f"the next round would need {need:,.0f} {name} in all, and the budget is {limit:,g}"
                     for name, limit, need in needs if limit is not None and need > limit)

  def _show_end(self, trials: Sequence[RoundTrial], spent: str) -> None:
    """Shows why the sweep ended, and its costs."""
    results = self._results(trials)
    looks = self.maker.looks(trials, results)
    if looks:
      show_answer(self.plan, looks[-1], spent)
    elif spent:
      console.show_warning(f"the sweep stops: {spent}")
    show_costs(self.plan, trials, results)

  def _next(self, rounds: Sequence[Round]) -> Round | None:
    trials = _trials(rounds)
    return self.maker.next_round(trials, self._results(trials))

  def _results(self, trials: Sequence[RoundTrial]) -> Results:
    return {trial.number: round_result(self.runs.read(trial.number), self.metric) for trial in trials}

  def _outcomes(self, trials: Sequence[RoundTrial]) -> dict[int, Outcome]:
    """How each run ended. A trial that diverged while tuning is a result and no failure."""
    ledger, outcomes = self.runs.ledger, {}
    for trial in trials:
      outcome = ledger.outcome(trial.number, " ".join(trial.overrides))
      if outcome is None:
        continue
      diverged = outcome.code == DivergedError.code or self.runs.read(trial.number).status == "diverged"
      outcomes[trial.number] = replace(outcome, code=DONE) if diverged and trial.purpose == TUNE else outcome
    return outcomes


def _trials(rounds: Sequence[Round]) -> list[RoundTrial]:
  return [trial for current in rounds for trial in current.trials]

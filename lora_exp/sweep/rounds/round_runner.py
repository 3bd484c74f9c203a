"""A sweep in rounds: trains a round, chooses the next one from the results, and repeats this until there is none.

A continued sweep trains the recorded rounds unchanged (`RoundLedger`) and chooses only the rounds after them.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from lora_exp.config.errors import DONE, DivergedError
from lora_exp.config.metrics import Metric
from lora_exp.runtime import console
from lora_exp.runtime.locks import run_lock
from lora_exp.sweep.ledger import Outcome
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.drop_runner import DropRunner
from lora_exp.sweep.rounds.next_round import RoundMaker
from lora_exp.sweep.rounds.round_budget import exceeded_limits
from lora_exp.sweep.rounds.round_ledger import RoundLedger
from lora_exp.sweep.rounds.round_plan import TUNE, Results, Round, RoundPlan, RoundTrial
from lora_exp.sweep.rounds.round_results import read_results
from lora_exp.sweep.rounds.round_table import show_answer, show_costs, show_look, show_round, show_time, show_tuning


class RoundRunner:
  """Trains the rounds of a sweep. `defaults`: the default of the tuned setting in each setting of the plan."""

  def __init__(
    self, plan: RoundPlan, defaults: Sequence[float | None], metric: Metric, margin: float, runs: LaunchedRuns
  ):
    self.plan, self.metric, self.runs = plan, metric, runs
    self.maker = RoundMaker(plan, defaults, margin)
    self.round_ledger = RoundLedger(plan, runs)
    self.drop_runner = DropRunner(self.maker, metric, runs, self.round_ledger)

  def train(self) -> dict[int, Outcome]:
    """Trains the sweep, or the rest of it. Returns how each run ended, by number.

    Raises InputError if the directory contains a sweep with other settings, InUseError if another process works on it.
    """
    with run_lock(self.runs.directory):
      self.round_ledger.check_plan()
      rounds = self.round_ledger.recorded()
      for number, recorded in enumerate(rounds):
        self._train_round(number, recorded)
      spent = ""
      while not self.runs.stopped():
        following = self._next(rounds)
        if following is None:
          break
        results = self._results(_trials(rounds))
        spent = exceeded_limits(self.plan.budget, results, self.round_ledger.seconds(), following)
        if spent:
          break
        self.round_ledger.add(len(rounds), following)
        rounds.append(following)
        self._train_round(len(rounds) - 1, following)
      if not self.runs.stopped():
        self._show_end(_trials(rounds), spent)
      return self._outcomes(_trials(rounds))

  def examples(self) -> dict[int, list[str]]:
    """The overrides of a recorded trial of each setting, by number; {} for a new sweep."""
    first: dict[int, RoundTrial] = {}
    for trial in _trials(self.round_ledger.recorded()):
      first.setdefault(trial.setting, trial)
    return {trial.number: trial.overrides for trial in first.values()}

  def _train_round(self, number: int, current: Round) -> None:
    """Trains a round and shows what it found. Does nothing if a signal stopped the sweep."""
    if self.runs.stopped():
      return
    show_round(number, current)
    jobs = {trial.number: trial.overrides for trial in current.trials}
    started, ended = time.monotonic(), {trial for trial in jobs if self.runs.ledger.ended(trial)}
    earlier = _trials(self.round_ledger.recorded()[:number])
    self.drop_runner.train(earlier, current)
    if self.runs.stopped():
      return
    self.runs.train(jobs, self._remaining(current), repeat_failed=self.plan.repeat_failed)
    if self.runs.stopped():
      return
    if len(ended) < len(jobs):
      self.round_ledger.add_seconds(number, time.monotonic() - started)
    trials = [*earlier, *current.trials]
    show_time(len(trials), self.round_ledger.seconds(), self.maker.known_trials(trials))
    results = self._results(trials)
    if any(trial.purpose == TUNE for trial in current.trials):
      show_tuning(self.plan, trials, results, self.metric)
    looks = self.maker.looks(trials, results)
    if looks:
      self.round_ledger.add_looks(looks)
      show_look(self.plan, looks[-1])

  def _remaining(self, current: Round) -> list[int]:
    """The trials of a round that were not dropped."""
    ledger = self.runs.ledger
    return [trial.number for trial in current.trials if ledger.state(trial.number) != "pruned"]

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
    return read_results(self.runs, trials, self.metric)

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

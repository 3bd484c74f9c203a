"""A sweep in rounds: trains a round, decides the next one from the results, until there is none.

The ledger has a row for each round with the overrides of its trials. A sweep that is continued trains the recorded
rounds as they are, and decides only those after them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_exp.config.errors import DONE, DivergedError, InputError
from lora_exp.config.metrics import Metric
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.locks import run_lock
from lora_exp.sweep.launched_runs import Launch, LaunchedRuns
from lora_exp.sweep.ledger import Outcome
from lora_exp.sweep.next_round import Results, RoundMaker
from lora_exp.sweep.round_plan import TUNE, Round, RoundPlan, RoundTrial
from lora_exp.sweep.round_table import show_costs, show_round, show_tuning


class RoundRunner:
  """Trains the rounds of the sweep in `directory`. `defaults` returns the defaults of the tuned setting."""

  def __init__(
    self, plan: RoundPlan, defaults: Callable[[], Sequence[float | None]], metric: Metric, runs: LaunchedRuns
  ):
    self.plan, self.metric, self.runs = plan, metric, runs
    self.maker = RoundMaker(plan, defaults())

  def train(self) -> dict[int, Outcome]:
    """Trains the sweep, or the rest of it. Returns how each run ended, by number.

    Raises InputError if the directory contains a sweep with other settings, InUseError if another process works on it.
    """
    with run_lock(self.runs.directory):
      self._check_plan()
      rounds = self._recorded()
      for number, recorded in enumerate(rounds):
        self._train_round(number, recorded)
      while not self.runs.stopped() and (following := self._next(rounds)) is not None:
        self._record(len(rounds), following)
        rounds.append(following)
        self._train_round(len(rounds) - 1, following)
      if not self.runs.stopped():
        show_costs(self.plan, _trials(rounds), self._read(_trials(rounds)))
      return self._outcomes(_trials(rounds))

  def _check_plan(self) -> None:
    """Records what the sweep compares. Raises InputError if the ledger has a sweep with another plan."""
    ledger, plan = self.runs.ledger, self.plan.fixed()
    before = next((row for row in ledger.rows if row["event"] == "rounds"), None)
    if before is None:
      if ledger.rows:
        raise InputError(f"hydra.sweep.dir={self.runs.directory}: holds a sweep that is not in rounds; use another "
                         "directory")
      ledger.add("rounds", **plan)
    elif differing := [key for key, value in plan.items() if before.get(key) != value]:
      names = {"jobs": "settings or seeds", "tune": "hydra.sweeper.tune"}
      raise InputError(f"hydra.sweep.dir={self.runs.directory}: the sweep was started with other "
                       f"{' and '.join(names.get(key, key) for key in differing)}; use the same command, or another "
                       "directory")

  def _recorded(self) -> list[Round]:
    """The rounds in the ledger."""
    rows = [row for row in self.runs.ledger.rows if row["event"] == "round"]
    return [Round(row["why"], [RoundTrial(**trial) for trial in row["jobs"]]) for row in rows]

  def _record(self, number: int, following: Round) -> None:
    """Adds a round to the ledger; `tuning` has the trials that score nothing."""
    tuning = [trial.number for trial in following.trials if trial.purpose == TUNE]
    jobs = [asdict(trial) for trial in following.trials]
    self.runs.ledger.add("round", round=number, why=following.why, tuning=tuning, jobs=jobs)

  def _train_round(self, number: int, current: Round) -> None:
    """Trains a round and shows what it found. Does nothing if a signal stopped the sweep."""
    if self.runs.stopped():
      return
    show_round(number, current)
    jobs = {trial.number: trial.overrides for trial in current.trials}
    self.runs.train(jobs, list(jobs), repeat_failed=self.plan.repeat_failed)
    if not self.runs.stopped() and any(trial.purpose == TUNE for trial in current.trials):
      trials = [trial for earlier in self._recorded()[: number + 1] for trial in earlier.trials]
      show_tuning(self.plan, trials, self._results(trials), self.metric)

  def _next(self, rounds: Sequence[Round]) -> Round | None:
    trials = _trials(rounds)
    return self.maker.next_round(trials, self._results(trials))

  def _read(self, trials: Sequence[RoundTrial]) -> dict[int, RunRecord]:
    return {trial.number: self.runs.read(trial.number) for trial in trials}

  def _results(self, trials: Sequence[RoundTrial]) -> Results:
    return {number: penalty(run, self.metric) for number, run in self._read(trials).items()}

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


def train_rounds(
  plan: RoundPlan, defaults: Callable[[], Sequence[float | None]], metric: Metric, directory: Path, launch: Launch,
  stopped: Callable[[], bool],
) -> dict[int, Outcome]:  # fmt: skip
  """Trains the sweep in `directory`, or the rest of it; see `RoundRunner`."""
  return RoundRunner(plan, defaults, metric, LaunchedRuns(directory, launch, stopped)).train()


def penalty(run: RunRecord, metric: Metric) -> float | None:
  """The metric on the tuning half of the held-out documents, with the sign that makes lower better.

  Infinity if the trial diverged, None if it has no result for another reason.
  """
  if run.status == "diverged":
    return math.inf
  value = run.tuning_result(metric.name)
  return None if value is None else metric.sign * value


def _trials(rounds: Sequence[Round]) -> list[RoundTrial]:
  return [trial for current in rounds for trial in current.trials]

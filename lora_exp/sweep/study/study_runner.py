"""A study trains batches of trials with the launcher until it has `n_trials` trials.

    sample a batch -> train to the next rung -> prune -> … -> train to the end -> tell -> sample the next

A trial is a point of the search space and has one run for each seed. Decisions depend only on the runs' files and are
recorded in Optuna's journal, in sweep.jsonl and in the summary.json of pruned runs, so that a killed study can
continue. Each batch is pruned by successive halving (arXiv 1502.07943): at a rung, the fraction `keep` of its trials
with the best results continues from checkpoints. The learning rate schedule is always that of the full length.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from lora_exp.config.metrics import METRICS
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime import console
from lora_exp.runtime.locks import run_lock
from lora_exp.sweep.ledger import Ledger, Outcome
from lora_exp.sweep.packs.launched_runs import Launch, LaunchedRuns
from lora_exp.sweep.study.study_journal import StudyJournal
from lora_exp.sweep.study.study_space import Study
from lora_exp.sweep.study.study_table import show_study, trial_line

COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING


def run(cfg: Study, directory: Path, launch: Launch, stopped: Callable[[], bool]) -> dict[int, Outcome]:
  """Trains the study in `directory`, or the rest of it. Returns how each run ended, by number.

  `launch` skips runs that have ended and resumes the others. `stopped` returns whether a signal stopped the study.
  Raises InputError if the directory contains a study with other settings or with more than `n_trials` trials, and
  InUseError if another process works on it.
  """
  with run_lock(directory):
    runner = StudyRunner(cfg, directory, launch, stopped)
    runner.train_extra()
    while not stopped() and (batch := runner.journal.batch()):
      runner.train_batch(batch)
    if not stopped():
      show_study(cfg, runner.journal)
    return runner.outcomes()


class StudyRunner:
  """Trains the batches of a study and decides which trials are pruned."""

  def __init__(self, cfg: Study, directory: Path, launch: Launch, stopped: Callable[[], bool]):
    self.cfg, self.directory, self.stopped = cfg, directory, stopped
    self.runs = LaunchedRuns(directory, launch, stopped)
    self.journal = StudyJournal(cfg, directory)
    if not self.ledger.path.exists():
      self.ledger.add("study", objectives=cfg.objectives, params=list(cfg.space))

  @property
  def ledger(self) -> Ledger:
    return self.runs.ledger

  def outcomes(self) -> dict[int, Outcome]:
    """How each finished run ended, by number."""
    ledger, extra = self.ledger, len(self.cfg.extra)
    names = dict.fromkeys(range(extra), "")
    names |= {n: f"trial {trial.number}" for trial in self.journal.all for n in self.cfg.runs(trial.number)}
    outcomes = {number: ledger.outcome(number, name) for number, name in names.items()}
    return {number: outcome for number, outcome in outcomes.items() if outcome is not None}

  # ---- runs

  def train_extra(self) -> None:
    """Trains the additional runs of `extra`, which have the first numbers."""
    if self.cfg.extra:
      console.show("\nadditional runs")
      jobs = dict(enumerate(self.cfg.extra))
      self.runs.train(jobs, list(jobs))

  def _runs(self, trial: FrozenTrial) -> list[RunRecord]:
    return [self.runs.read(number) for number in self.cfg.runs(trial.number)]

  # ---- a batch

  def train_batch(self, batch: Sequence[FrozenTrial]) -> None:
    """Trains a batch from rung to rung to the end. Returns early if a signal stops the study."""
    numbers = [trial.number for trial in batch]
    first, last = numbers[0], numbers[-1]
    console.show(f"\ntrial{f's {first}-{last}' if last > first else f' {first}'} of {self.cfg.n_trials}")
    self._record_trials(batch)
    for rung in self.cfg.rungs:
      if any(rung not in trial.intermediate_values for trial in self._running(numbers)):
        self._train_trials(rung, numbers)
        if self.stopped():
          return
        for trial in self._running(numbers):
          self.journal.report(trial.number, rung, self._value_at(trial, rung))
      self._halve(rung, numbers)
    if self._running(numbers):
      self._train_trials(None, numbers)
    if not self.stopped():
      self._tell(numbers)

  def _value_at(self, trial: FrozenTrial, rung: int) -> float:
    """The first objective of a trial at a rung, averaged over its runs."""
    return _mean([metric_at(run, self.cfg.objectives[0], rung) for run in self._runs(trial)])

  def _record_trials(self, batch: Sequence[FrozenTrial]) -> None:
    """Adds the trials of a batch to the ledger, each once."""
    ledger = self.ledger
    known = {row["study_trial"] for row in ledger.rows if row["event"] == "trial"}
    for trial in batch:
      if trial.number not in known:
        runs = self.cfg.runs(trial.number)
        ledger.add("trial", study_trial=trial.number, runs=runs, params=trial.params)

  def _running(self, numbers: Sequence[int]) -> list[FrozenTrial]:
    trials = self.journal.all
    return [trials[number] for number in numbers if trials[number].state == RUNNING]

  def _train_trials(self, step: int | None, numbers: Sequence[int]) -> None:
    """Trains the running trials of a batch to `step`. A trial fails if one of its runs fails."""
    jobs: dict[int, list[str]] = {}
    for number in numbers:
      params = self.journal.all[number].params
      jobs |= {run: self.cfg.job(params, repeat) for repeat, run in enumerate(self.cfg.runs(number))}
    self.runs.train(jobs, [run for trial in self._running(numbers) for run in self.cfg.runs(trial.number)], step)
    if self.stopped():
      return
    ledger = self.ledger
    for trial in self._running(numbers):
      reasons = {run: ledger.reason(run) for run in self.cfg.runs(trial.number)}
      failed = next((run for run, reason in reasons.items() if reason is not None), None)
      if failed is not None:
        self._prune(trial, f"its trial failed in run {failed}")
        self._end(trial, FAIL, None, f"run {failed}: {reasons[failed]}")

  # ---- decisions

  def _halve(self, rung: int, numbers: Sequence[int]) -> None:
    """Prunes all trials at this rung except the best fraction `keep`. Repeated calls make the same decision."""
    trials = [self.journal.all[number] for number in numbers]
    values = {trial.number: trial.intermediate_values[rung] for trial in trials if rung in trial.intermediate_values}
    count = math.ceil(self.cfg.keep * len(values))
    sign, label = self.cfg.signs[0], METRICS[self.cfg.objectives[0]].label
    best = sorted(values, key=lambda number: (sign * values[number], number))[:count]
    for trial in self._running(numbers):
      if trial.number not in best:
        value = values[trial.number]
        reason = f"at step {rung}, not among the best {count} of {len(values)}: held-out {label} {value:.4f}"
        self._prune(trial, reason)
        self._end(trial, PRUNED, None, reason)

  def _prune(self, trial: FrozenTrial, reason: str) -> None:
    """Marks all runs of a trial that have not ended as pruned."""
    for run in self._runs(trial):
      self.runs.prune(run, reason)

  def _tell(self, numbers: Sequence[int]) -> None:
    """Records the objectives of the trials that were trained to the end."""
    for trial in self._running(numbers):
      runs = self._runs(trial)
      values = [_mean([objective_value(run, name) for run in runs]) for name in self.cfg.objectives]
      wrong = [name for name, value in zip(self.cfg.objectives, values, strict=True) if not math.isfinite(value)]
      if wrong:
        self._end(trial, FAIL, None, f"its {wrong[0]} is not a finite number")
      else:
        self._end(trial, COMPLETE, values)

  def _end(
    self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None, reason: str | None = None
  ) -> None:
    """Records and shows how a trial ended."""
    self.journal.tell(trial.number, values, state, reason)
    result = {"reason": reason} if values is None else dict(zip(self.cfg.objectives, values, strict=True))
    self.ledger.add("told", study_trial=trial.number, state=state.name.lower(), **result)
    console.show(trial_line(self.journal.all[trial.number], self.cfg.objectives))


def metric_at(run: RunRecord, metric: str, step: int) -> float:
  """The metric, on the tuning half, of the state that the run would export if it ended at `step`.

  NaN if it was not evaluated.
  """
  losses = [(at, loss) for at, loss in run.tuning_curve("loss") if 0 < at <= step]
  if not losses:
    return math.nan
  exports_last = run.config.get("train.export") == "last"
  exported = losses[-1][0] if exports_last else min(losses, key=_loss_of)[0]
  return dict(run.tuning_curve(metric)).get(exported, math.nan)


def _loss_of(point: tuple[int, float]) -> float:
  return point[1]


def objective_value(run: RunRecord, objective: str) -> float | None:
  """The objective of one run: a metric of `METRICS` on the tuning half, or a cost; None if it does not apply."""
  if objective in METRICS:
    return run.tuning_result(objective)
  return run.trainable if objective == "trainable" else run.forgetting


def _mean(values: Sequence[float | None]) -> float:
  """The mean; NaN if a value is missing."""
  return sum(math.nan if value is None else value for value in values) / len(values)

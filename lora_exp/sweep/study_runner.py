"""A study: batches of trials, each trained by the launcher, until there are as many as were asked for.

    choose a batch -> train to the next rung -> prune -> … -> train to the end -> tell -> choose the next

Every decision is read from the runs' files and written to Optuna's journal, to sweep.jsonl and to the pruned runs'
summary.json, so that a killed study goes on where it was. Successive halving (arXiv 1502.07943) is done here, in each
batch: at a rung the best `keep` of its trials go on from their checkpoints, on the schedule of the whole length.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from lora_exp.config.errors import StoppedError
from lora_exp.config.metrics import METRICS
from lora_exp.report.reading.run_reader import read_run
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime import console
from lora_exp.runtime.files import write_json
from lora_exp.runtime.locks import run_lock
from lora_exp.sweep.ledger import Ledger, Outcome
from lora_exp.sweep.study_journal import StudyJournal, finished
from lora_exp.sweep.study_space import Study
from lora_exp.train.run_summary import short

Launch = Callable[[list[list[str]], int], object]  # overrides of each run, number of the first
COMPLETE, PRUNED, FAIL, RUNNING = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING
MOST_SHOWN = 10  # trials in the table at the end


def run(cfg: Study, directory: Path, launch: Launch, stopped: Callable[[], bool]) -> dict[int, Outcome]:
  """Trains what is missing of the study in `directory`; how each run ended, by number.

  `launch` leaves out runs that have ended, and goes on with the others. `stopped` says whether a signal ended it.
  Raises InputError if the study was begun as another, or has more trials than it is to have, and InUseError where
  another process works on it.
  """
  with run_lock(directory):
    going = StudyRunner(cfg, directory, launch, stopped)
    going.train_extra()
    while not stopped() and (batch := going.trials.batch()):
      going.train(batch)
    if not stopped():
      going.show()
    return going.outcomes()


class StudyRunner:
  """A study at work."""

  def __init__(self, cfg: Study, directory: Path, launch: Launch, stopped: Callable[[], bool]):
    self.cfg, self.directory, self.launch, self.stopped = cfg, directory, launch, stopped
    self.trials = StudyJournal(cfg, directory)
    if not self.ledger.path.exists():
      self.ledger.add("study", objectives=cfg.objectives, params=list(cfg.space))

  @property
  def ledger(self) -> Ledger:
    """As it is now: the launcher writes it too."""
    return Ledger(self.directory)

  def outcomes(self) -> dict[int, Outcome]:
    """How each run ended; those of a stopped study that did not are left out."""
    ledger, count = self.ledger, len(self.cfg.extra) + len(self.trials.all) * len(self.cfg.repeats)
    asked = lambda n: f"trial {(n - len(self.cfg.extra)) // len(self.cfg.repeats)}" if n >= len(self.cfg.extra) else ""
    found = (ledger.outcome(n, asked(n)) for n in range(count))
    return {outcome.number: outcome for outcome in found if outcome is not None}

  # runs

  def train_extra(self) -> None:
    """The runs beside the trials, which are numbered before them."""
    if self.cfg.extra:
      console.show("\nruns beside the trials")
      jobs = dict(enumerate(self.cfg.extra))
      self._train_to(None, jobs, list(jobs))

  def _runs(self, trial: int) -> list[int]:
    """The numbers of the runs of a trial, one for each of its seeds."""
    count = len(self.cfg.repeats)
    first = len(self.cfg.extra) + trial * count
    return list(range(first, first + count))

  def _trial(self, run: int) -> RunRecord:
    return read_run(run, self.directory / str(run))

  def _trials(self, trial: int) -> list[RunRecord]:
    return [self._trial(n) for n in self._runs(trial)]

  def _train_to(self, step: int | None, jobs: Mapping[int, list[str]], wanted: Sequence[int]) -> None:
    """Launches those of the runs `wanted` that are not at `step` yet (None: the end), and notes how they ended.

    `jobs` are the overrides of each run of the batch: a launcher that packs them makes the same packs each time.
    """
    ledger = self.ledger
    missing = [n for n in wanted if not _there(self._trial(n), ledger, step)]
    extra = [] if step is None else [f"train.stop_at={step}"]
    if missing:
      self.launch([[*job, *extra] for job in jobs.values()], min(jobs))
    if not self.stopped():
      self._note_ends(step, wanted)

  def _note_ends(self, step: int | None, wanted: Sequence[int]) -> None:
    ledger = self.ledger
    for trial in map(self._trial, wanted):
      if ledger.ended(trial.number):
        continue
      if trial.status == "done":
        ledger.add("done", trial=trial.number)
      elif trial.status == "stopped" and not _there(trial, ledger, step):  # by a signal that another process got
        where = short(self.directory)
        raise StoppedError(f"run {trial.number}: {trial.reason}; go on with the same command and hydra.sweep.dir={where}")
      elif not _there(trial, ledger, step):
        ledger.add("failed", trial=trial.number, reason=trial.reason or "it left no reason")

  # a batch

  def train(self, batch: Sequence[FrozenTrial]) -> None:
    """Takes a batch from rung to rung to its end; leaves it as it is when a signal comes."""
    numbers = [trial.number for trial in batch]
    first, last = numbers[0], numbers[-1]
    console.show(f"\ntrial{f's {first}-{last}' if last > first else f' {first}'} of {self.cfg.n_trials}")
    self._note(batch)
    for rung in self.cfg.rungs:
      if any(rung not in trial.intermediate_values for trial in self._running(numbers)):
        self._train_trials(rung, numbers)
        if self.stopped():
          return
        for trial in self._running(numbers):
          self.trials.report(trial.number, rung, self._at_rung(trial.number, rung))
      self._halve(rung, numbers)
    if self._running(numbers):
      self._train_trials(None, numbers)
    if not self.stopped():
      self._tell(numbers)

  def _at_rung(self, trial: int, rung: int) -> float:
    """The objective of a trial at a rung: the mean over its runs."""
    return _mean([metric_at(run, self.cfg.objectives[0], rung) for run in self._trials(trial)])

  def _note(self, batch: Sequence[FrozenTrial]) -> None:
    ledger = self.ledger
    known = {row["study_trial"] for row in ledger.rows if row["event"] == "trial"}
    for trial in batch:
      if trial.number not in known:
        ledger.add("trial", study_trial=trial.number, runs=self._runs(trial.number), params=trial.params)

  def _running(self, numbers: Sequence[int]) -> list[FrozenTrial]:
    return [self.trials.all[n] for n in numbers if self.trials.all[n].state == RUNNING]

  def _train_trials(self, step: int | None, numbers: Sequence[int]) -> None:
    """Takes the running trials of a batch to `step`, and fails those of which a run failed."""
    jobs = {run: self.cfg.job(self.trials.all[trial].params, i)
            for trial in numbers for i, run in enumerate(self._runs(trial))}  # fmt: skip
    self._train_to(step, jobs, [run for trial in self._running(numbers) for run in self._runs(trial.number)])
    if self.stopped():
      return
    ledger = self.ledger
    for trial in self._running(numbers):
      failed = [(run, reason) for run in self._runs(trial.number) if (reason := ledger.reason(run)) is not None]
      for run, reason in failed[:1]:
        for record in self._trials(trial.number):
          self._prune(record, f"its trial failed in run {run}")
        self._end(trial, FAIL, None, f"run {run}: {reason}")

  # what is decided

  def _halve(self, rung: int, numbers: Sequence[int]) -> None:
    """Prunes all but the best `keep` of those that came to this rung; the same whenever it is asked again."""
    trials = [self.trials.all[n] for n in numbers]
    values = {t.number: t.intermediate_values[rung] for t in trials if rung in t.intermediate_values}
    count = math.ceil(self.cfg.keep * len(values))
    sign, label = self.cfg.signs[0], METRICS[self.cfg.objectives[0]].label
    best = sorted(values, key=lambda n: (sign * values[n], n))[:count]
    for trial in self._running(numbers):
      if trial.number not in best:
        reason = (f"at step {rung}, not among the best {count} of {len(values)}: "
                  f"held-out {label} {values[trial.number]:.4f}")
        for record in self._trials(trial.number):
          self._prune(record, reason)
        self._end(trial, PRUNED, None, reason)

  def _prune(self, trial: RunRecord, reason: str) -> None:
    """Marks a run that was begun and will not go on."""
    if self.ledger.ended(trial.number):
      return
    if trial.summary:
      file = self.directory / trial.path / "summary.json"
      write_json(file, {**trial.summary, "status": "pruned", "reason": reason})
    self.ledger.add("pruned", trial=trial.number, reason=reason)

  def _tell(self, numbers: Sequence[int]) -> None:
    for trial in self._running(numbers):
      trials = self._trials(trial.number)
      values = [_mean([objective_value(trial, name) for trial in trials]) for name in self.cfg.objectives]
      wrong = [name for name, value in zip(self.cfg.objectives, values, strict=True) if not math.isfinite(value)]
      if wrong:
        self._end(trial, FAIL, None, f"its {wrong[0]} is no finite number")
      else:
        self._end(trial, COMPLETE, values)

  def _end(self, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None, reason: str | None = None):
    self.trials.tell(trial.number, values, state, reason)
    told = {"reason": reason} if values is None else dict(zip(self.cfg.objectives, values, strict=True))
    self.ledger.add("told", study_trial=trial.number, state=state.name.lower(), **told)
    console.show(f"trial {trial.number}: {words(trial)}  {self._outcome(self.trials.all[trial.number])}")

  # what is shown

  def _outcome(self, trial: FrozenTrial) -> str:
    if trial.state == COMPLETE:
      return "  ".join(_said(n, v) for n, v in zip(self.cfg.objectives, trial.values, strict=True))
    reason = str(trial.user_attrs.get("reason"))
    return f"pruned {reason}" if trial.state == PRUNED else f"failed: {reason}"

  def show(self) -> None:
    """The best trial and those after it, or the Pareto front."""
    trials, objectives = self.trials.all, self.cfg.objectives
    ends = (("complete", COMPLETE), ("pruned", PRUNED), ("failed", FAIL))
    counts = ", ".join(f"{len(found)} {word}" for word, state in ends if (found := finished(trials, state)))
    if len(trials) < self.cfg.n_trials:
      console.show_warning(f"the space has {len(trials)} points, and all of them are tried; hydra.sweeper.n_trials="
                          f"{self.cfg.n_trials} are not to be had")
    if len(objectives) > 1:
      shown = sorted(self.trials.study.best_trials, key=lambda t: t.values[::-1])
      title = f"Pareto front of {' and '.join(objectives)}: {len(shown)} of {len(trials)} trials ({counts})"
    else:
      shown = sorted(finished(trials, COMPLETE), key=lambda t: self.cfg.signs[0] * t.values[0])[:MOST_SHOWN]
      title = f"Best of {len(trials)} trials ({counts})"
    names = [key.rpartition(".")[2] for key in self.cfg.space]
    rows = [[t.number, ", ".join(map(str, self._runs(t.number))), *(_short(t.params[k]) for k in self.cfg.space),
             *(round(v) if n == "trainable" else v for n, v in zip(objectives, t.values, strict=True))] for t in shown]
    console.show_table(title, ["trial", "runs", *names, *objectives], rows, right=names)


def metric_at(trial: RunRecord, metric: str, step: int) -> float:
  """The held-out metric of the state that the run would export, had it ended at `step`; NaN without one."""
  losses = [(at, loss) for at, loss in trial.curve("eval", "loss") if 0 < at <= step]
  if not losses:
    return math.nan
  exports_last = trial.config.get("train.export") == "last"
  exported = losses[-1][0] if exports_last else min(losses, key=_loss_of)[0]
  return dict(trial.curve("eval", metric)).get(exported, math.nan)


def _loss_of(point: tuple[int, float]) -> float:
  return point[1]


def objective_value(trial: RunRecord, objective: str) -> float | None:
  """What a study optimises, of one run: a metric of `METRICS`, or a cost; None if the run does not have it."""
  if objective in METRICS:
    return trial.result(objective)
  return trial.trainable if objective == "trainable" else trial.number_at("losses", "forgetting")


def _there(trial: RunRecord, ledger: Ledger, step: int | None) -> bool:
  """Whether a run has come to `step`, or to an end of its own."""
  if ledger.ended(trial.number) or trial.status == "done":
    return True
  last = max((row["step"] for row in trial.metrics), default=0)
  return step is not None and trial.status == "stopped" and last >= step


def words(trial: FrozenTrial) -> str:
  """The settings of a trial."""
  return "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.params.items())


def _short(value: object) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _said(name: str, value: float) -> str:
  return f"{name} {value:,.0f}" if name == "trainable" else f"{name} {value:.4f}"


def _mean(values: Sequence[float | None]) -> float:
  found = [math.nan if value is None else value for value in values]
  return sum(found) / len(found)

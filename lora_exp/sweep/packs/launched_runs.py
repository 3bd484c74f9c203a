"""Runs of a sweep that a launcher trains: which are missing, how they ended, and their results.

Studies and sweeps in rounds launch their runs batch after batch and decide from the files of the runs.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_exp.config.errors import StoppedError
from lora_exp.report.reading.run_reader import read_run
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.display_paths import typed_path
from lora_exp.runtime.files import write_json
from lora_exp.runtime.run_files import SUMMARY
from lora_exp.sweep.ledger import Ledger

Launch = Callable[[list[list[str]], int], object]  # overrides of each run, number of the first


class LaunchedRuns:
  """The runs of the sweep in `directory`.

  `launch` skips runs that have ended and resumes the others. `stopped` returns whether a signal stopped the sweep.
  """

  def __init__(self, directory: Path, launch: Launch, stopped: Callable[[], bool]):
    self.directory, self.launch, self.stopped = directory, launch, stopped

  @property
  def ledger(self) -> Ledger:
    """The current ledger, read again because the launcher also writes to it."""
    return Ledger(self.directory)

  def read(self, number: int) -> RunRecord:
    """The files of a run."""
    return read_run(number, self.directory / str(number))

  def train(
    self, jobs: Mapping[int, list[str]], numbers: Sequence[int], step: int | None = None, repeat_failed: bool = False
  ) -> None:
    """Trains the runs `numbers` to `step` (None: to the end) and records in the ledger how they ended.

    `jobs` has the overrides of all runs of the batch, so that a packing launcher makes the same packs each time. With
    `repeat_failed` the launcher is called for failed runs too. Raises StoppedError if another process stopped a run.
    """
    ledger = self.ledger
    for number in numbers:
      ledger.reopen(number, self.directory / str(number))
    missing = [number for number in numbers if not has_reached(self.read(number), ledger, step)]
    failed = [number for number in numbers if repeat_failed and ledger.state(number) == "failed"]
    stop = [] if step is None else [f"train.stop_at={step}"]
    if missing or failed:
      self.launch([[*job, *stop] for job in jobs.values()], min(jobs))
    if not self.stopped():
      self._record_ends(step, numbers)

  def prune(self, run: RunRecord, reason: str) -> None:
    """Marks a run as pruned for `reason`, unless it has ended."""
    ledger = self.ledger
    if ledger.ended(run.number):
      return
    if run.summary:
      write_json(self.directory / run.path / SUMMARY, {**run.summary, "status": "pruned", "reason": reason})
    ledger.add("pruned", trial=run.number, reason=reason)

  def _record_ends(self, step: int | None, numbers: Sequence[int]) -> None:
    """Records the ends that the launcher has not recorded. Raises StoppedError if a run was stopped by a signal."""
    ledger = self.ledger
    for run in map(self.read, numbers):
      if ledger.ended(run.number):
        continue
      if run.status == "done":
        ledger.add("done", trial=run.number)
      elif run.status == "stopped" and not has_reached(run, ledger, step):  # a signal to another process
        again = f"continue with the same command and {typed_path('hydra.sweep.dir', self.directory)}"
        raise StoppedError(f"run {run.number}: {run.reason}; {again}")
      elif not has_reached(run, ledger, step):
        ledger.add("failed", trial=run.number, reason=run.reason or "it left no reason")


def has_reached(run: RunRecord, ledger: Ledger, step: int | None) -> bool:
  """Whether a run has reached `step`, or has ended."""
  if ledger.ended(run.number) or run.status == "done":
    return True
  return step is not None and run.status == "stopped" and run.last_step >= step

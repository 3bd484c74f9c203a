"""sweep.jsonl: a log of the events of a sweep's runs, one per line, with which the same command continues the sweep.

Every process that trains a run appends to it, possibly from another machine. A line is written under the file's lock
and flushed to disk before the lock is released.
"""

import fcntl
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lora_exp.config.errors import BUG, DONE, IN_USE, STOPPED, LoraExpError
from lora_exp.runtime.console import show, show_error, show_warning
from lora_exp.runtime.display_paths import typed_path
from lora_exp.runtime.json_lines import read_ledger
from lora_exp.runtime.run_files import LEDGER, SUMMARY


@dataclass(frozen=True)
class Outcome:
  """How a run of a sweep ended. Returned by the process that trained it."""

  number: int
  code: int = DONE  # exit code
  reason: str | None = None  # why it did not finish
  overrides: str = ""  # of the run, separated by spaces


class Ledger:
  """The ledger of the sweep in `directory`: the rows at the time it was read, and those added since."""

  def __init__(self, directory: Path):
    self.path = directory / LEDGER
    self.rows = read_ledger(directory)

  def add(self, event: str, **facts: Any) -> None:
    """Appends a row.

    Events of a run: started, stopped, done, failed, pruned, repeated, and lost (its process died, or its files were
    deleted). Events of a pack: pack, and split if it did not fit in memory. Events of a study: study, trial, told.
    Events of a sweep in rounds: rounds (what it compares), round (its trials and why), round_done (seconds), dropped (a
    setting, with all of its trials, early in its training), look (verdicts after a number of seeds, and the level at
    which they are tested).
    """
    row = {"event": event, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    self.rows.append(row)
    with self.path.open("ab+") as file:
      fcntl.flock(file, fcntl.LOCK_EX)  # no other process writes, so an incomplete line is from a dead process
      _remove_incomplete_line(file)
      file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())

  def end(self, outcome: Outcome) -> None:
    """Records that a run ended. Does nothing if it was stopped or if another process trains it."""
    if outcome.code == DONE:
      self.add("done", trial=outcome.number)
    elif outcome.code not in (STOPPED, IN_USE):
      self.add("failed", trial=outcome.number, code=outcome.code, reason=outcome.reason)

  def fail(self, number: int, error: LoraExpError) -> None:
    """Records, logs and shows why a run failed, unless it has already ended."""
    if not self.ended(number):
      logging.getLogger("lora_exp").error("run %d: %s", number, error)
      self.add("failed", trial=number, code=error.code, reason=str(error))
      show_error(LoraExpError(f"run {number}: {error}"))

  def reopen(self, number: int, run_dir: Path) -> None:
    """Records and shows that a run is to be trained again, if it is done but its summary was deleted."""
    if self.state(number) == "done" and not (run_dir / SUMMARY).is_file():
      self.add("lost", trial=number, reason=f"its {SUMMARY} was deleted")
      show(f"run {number}: was done, but {run_dir / SUMMARY} is missing; it is trained again")

  def _last(self, number: int) -> dict[str, Any]:
    """The latest row of a run; {} if there is none."""
    return next((row for row in reversed(self.rows) if row.get("trial") == number), {})

  def state(self, number: int) -> str | None:
    """The latest event of a run, or None."""
    return self._last(number).get("event")

  def packs(self) -> list[list[int]]:
    """The run numbers of each pack, in the order of the packs. A run belongs to the last pack that lists it."""
    rows = [row["trials"] for row in self.rows if row["event"] == "pack"]
    latest = {number: index for index, numbers in enumerate(rows) for number in numbers}
    return [[number for number in latest if latest[number] == index] for index in dict.fromkeys(latest.values())]

  def ended(self, number: int) -> bool:
    """Whether a run is done, has failed, or was pruned by its sweep."""
    return self.state(number) in ("done", "failed", "pruned")

  def outcome(self, number: int, overrides: str = "") -> Outcome | None:
    """How a run ended, or None."""
    last = self._last(number)
    if not self.ended(number):
      return None
    code = last.get("code", BUG) if last["event"] == "failed" else DONE
    return Outcome(number, code, last.get("reason"), overrides)

  def reason(self, number: int) -> str | None:
    """Why a run failed, or None."""
    last = self._last(number)
    return last["reason"] if last.get("event") == "failed" else None


def _remove_incomplete_line(file: BinaryIO) -> None:
  """Truncates the file after its last newline."""
  file.seek(0)
  content = file.read()
  if not content.endswith(b"\n"):
    file.truncate(content.rfind(b"\n") + 1)


def show_failures(outcomes: Sequence[Outcome], directory: Path | None) -> None:
  """Shows the failed runs of a multirun with their overrides and reasons, and how to continue stopped ones."""
  common = set.intersection(*(set(o.overrides.split()) for o in outcomes)) if len(outcomes) > 1 else set()
  failed = [o for o in outcomes if o.code not in (DONE, STOPPED)]
  stopped = sum(o.code == STOPPED for o in outcomes)
  if failed:
    show_warning(f"{len(failed)} of {len(outcomes)} runs failed")
  for o in sorted(failed, key=lambda o: o.number):
    distinct = " ".join(text for text in o.overrides.split() if text not in common)
    show_error(LoraExpError(f"run {o.number}{f' ({distinct})' if distinct else ''}: {o.reason}"))
  if stopped:
    show_warning(
      f"{stopped} of {len(outcomes)} runs stopped before the end; continue with the same command and "
      f"{'hydra.sweep.dir=…' if directory is None else typed_path('hydra.sweep.dir', directory)}"
    )

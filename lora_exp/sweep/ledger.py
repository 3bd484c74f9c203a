"""sweep.jsonl: what happened to each run of a sweep, a line each, so that the same command can continue it.

Every process that trains a run appends its lines, on whichever machine it is: under the file's lock, and flushed to the
disk before the lock is released.
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
from lora_exp.runtime.console import show_error, show_warning
from lora_exp.runtime.json_lines import read_ledger
from lora_exp.runtime.run_files import LEDGER


@dataclass(frozen=True)
class Outcome:
  """How a run of a sweep ended; returned from the process that trained it."""

  number: int
  code: int = DONE  # exit code
  reason: str | None = None  # why it is not done
  overrides: str = ""  # of this run, separated by spaces


class Ledger:
  """The ledger of the sweep in `directory`: the rows when it was read, and those added since."""

  def __init__(self, directory: Path):
    self.path = directory / LEDGER
    self.rows = read_ledger(directory)

  def add(self, event: str, **facts: Any) -> None:
    """Appends a row. Events of a run: started, stopped, done, failed, pruned, repeated, lost (with its process).

    Events of several runs: pack, and split where a pack did not fit in memory. Events of a study: study, trial, told.
    """
    row = {"event": event, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    self.rows.append(row)
    with self.path.open("ab+") as file:
      fcntl.flock(file, fcntl.LOCK_EX)  # no living process is writing now, so an incomplete line is a dead one's
      _remove_incomplete_line(file)
      file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())

  def end(self, outcome: Outcome) -> None:
    """The row of a run that ended; none if it was stopped, or if another process trains it."""
    if outcome.code == DONE:
      self.add("done", trial=outcome.number)
    elif outcome.code not in (STOPPED, IN_USE):
      self.add("failed", trial=outcome.number, code=outcome.code, reason=outcome.reason)

  def fail(self, number: int, error: LoraExpError) -> None:
    """Records, logs and shows why a run failed, unless it has ended before."""
    if not self.ended(number):
      logging.getLogger("lora_exp").error("run %d: %s", number, error)
      self.add("failed", trial=number, code=error.code, reason=str(error))
      show_error(LoraExpError(f"run {number}: {error}"))

  def _last(self, number: int) -> dict[str, Any]:
    return next((row for row in reversed(self.rows) if row.get("trial") == number), {})

  def state(self, number: int) -> str | None:
    """The latest event of a run, or None."""
    return self._last(number).get("event")

  def packs(self) -> list[list[int]]:
    """The numbers of the runs that train together since the latest change, in the order of their packs."""
    rows = [row["trials"] for row in self.rows if row["event"] == "pack"]
    latest = {number: place for place, numbers in enumerate(rows) for number in numbers}
    return [[number for number in latest if latest[number] == place] for place in dict.fromkeys(latest.values())]

  def ended(self, number: int) -> bool:
    """Whether a run is trained and written, has failed, or was pruned by a study."""
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
  file.seek(0)
  content = file.read()
  if not content.endswith(b"\n"):
    file.truncate(content.rfind(b"\n") + 1)


def show_failures(outcomes: Sequence[Outcome], directory: Path | None) -> None:
  """Shows which runs of a multirun failed, the overrides that only they have, why, and how to continue stopped ones."""
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
      f"{stopped} of {len(outcomes)} runs stopped before the end; go on with the same command and "
      f"hydra.sweep.dir={directory}"
    )

"""sweep.jsonl: what happened to each trial of a sweep, a line each, so that the same command can go on.

Whoever trains a trial writes its lines, in whichever process or on whichever machine that is: each line under the file's
lock, at the end, and on the disk before the lock is given back.
"""

import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.errors import BUG, DONE, IN_USE, STOPPED, LoraExpError
from lora_exp.runtime.console import show_error, show_warning
from lora_exp.runtime.json_lines import read_ledger
from lora_exp.runtime.run_files import LEDGER


@dataclass(frozen=True)
class Outcome:
  """How a run of a sweep ended: what travels back from the process that trained it."""

  number: int
  code: int = DONE
  reason: str | None = None  # why it is not done
  asked: str = ""  # its overrides


class Ledger:
  """The ledger of the sweep in `directory`, as it is now; a last line that a kill tore counts for nothing."""

  def __init__(self, directory: Path):
    self.path = directory / LEDGER
    self.rows = read_ledger(directory)

  def add(self, event: str, **facts: Any) -> None:
    """A line: `started`, `stopped`, `done`, `failed` or `pruned` of a trial; `lost` with its process; `pack` of several,
    `split` where they were too many; `trial` of a study."""
    row = {"event": event, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    self.rows.append(row)
    with self.path.open("ab+") as file:
      fcntl.flock(file, fcntl.LOCK_EX)  # its holder is alive: what is torn now was torn by a dead one
      _cut_torn(file)
      file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
      file.flush()
      os.fsync(file.fileno())

  def end(self, outcome: Outcome) -> None:
    """The line of a trial that ended; none of one that was stopped, or that another process trains."""
    if outcome.code == DONE:
      self.add("done", trial=outcome.number)
    elif outcome.code not in (STOPPED, IN_USE):
      self.add("failed", trial=outcome.number, code=outcome.code, reason=outcome.reason)

  def _last(self, trial: int) -> dict[str, Any]:
    return next((row for row in reversed(self.rows) if row.get("trial") == trial), {})

  def state(self, trial: int) -> str | None:
    """The latest event of a trial, or None."""
    return self._last(trial).get("event")

  def packs(self) -> list[list[int]]:
    """The trials that train together since the latest change, in the order in which their packs were begun."""
    latest = {trial: number for number, row in enumerate(self.rows) if row["event"] == "pack" for trial in row["trials"]}
    return [[trial for trial in latest if latest[trial] == number] for number in dict.fromkeys(latest.values())]

  def ended(self, trial: int) -> bool:
    """Whether a trial is trained and written, or failed for a reason of its own, or was pruned by a study."""
    return self.state(trial) in ("done", "failed", "pruned")

  def outcome(self, trial: int, asked: str = "") -> Outcome | None:
    """How a trial ended, or None."""
    last = self._last(trial)
    if not self.ended(trial):
      return None
    return Outcome(trial, last.get("code", BUG) if last["event"] == "failed" else DONE, last.get("reason"), asked)

  def reason(self, trial: int) -> str | None:
    """Why a trial failed, or None."""
    last = self._last(trial)
    return last["reason"] if last.get("event") == "failed" else None


def _cut_torn(file: Any) -> None:
  file.seek(0)
  content = file.read()
  if not content.endswith(b"\n"):
    file.truncate(content.rfind(b"\n") + 1)


def show_failures(outcomes: Sequence[Outcome], directory: Path | None) -> None:
  """Which runs of a multirun failed, what each was asked beside the others, and why; and how those stopped go on."""
  common = set.intersection(*(set(o.asked.split()) for o in outcomes)) if len(outcomes) > 1 else set()
  failed = [o for o in outcomes if o.code not in (DONE, STOPPED)]
  stopped = sum(o.code == STOPPED for o in outcomes)
  if failed:
    show_warning(f"{len(failed)} of {len(outcomes)} runs failed")
  for o in sorted(failed, key=lambda o: o.number):
    own = " ".join(word for word in o.asked.split() if word not in common)
    show_error(LoraExpError(f"run {o.number}{f' ({own})' if own else ''}: {o.reason}"))
  if stopped:
    show_warning(f"{stopped} of {len(outcomes)} runs stopped before the end; go on with the same command and "
                 f"hydra.sweep.dir={directory}")

"""sweep.jsonl: what happened to each arm of a sweep, a line each, so that the same command can go on."""

import json
import os
import time
from pathlib import Path
from typing import Any

FILE = "sweep.jsonl"


class Ledger:
  """The ledger of the sweep in `directory`; a last line that a kill tore is cut off."""

  def __init__(self, directory: Path):
    self.path = directory / FILE
    self.rows: list[dict[str, Any]] = []
    if self.path.exists():
      whole = self.path.read_bytes().rpartition(b"\n")[0]
      self.rows = [json.loads(line) for line in whole.decode().splitlines()]
      os.truncate(self.path, len(whole) + bool(whole))

  def add(self, event: str, **facts: Any) -> None:
    """A line: `started`, `done` or `failed` of an arm; `pack` of several, `split` where they were too many."""
    row = {"event": event, **facts, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    self.rows.append(row)
    with self.path.open("a", encoding="utf-8") as file:
      file.write(json.dumps(row, ensure_ascii=False) + "\n")
      file.flush()
      os.fsync(file.fileno())

  def state(self, arm: int) -> str | None:
    """The latest event of an arm, or None."""
    return next((row["event"] for row in reversed(self.rows) if row.get("arm") == arm), None)

  def packs(self) -> list[list[int]]:
    """The arms that train together since the latest change, in the order in which their packs were begun."""
    latest = {arm: number for number, row in enumerate(self.rows) if row["event"] == "pack" for arm in row["arms"]}
    return [[arm for arm in latest if latest[arm] == number] for number in dict.fromkeys(latest.values())]

  def ended(self, arm: int) -> bool:
    """Whether an arm is trained and written, or failed for a reason of its own."""
    return self.state(arm) in ("done", "failed")

  def reason(self, arm: int) -> str | None:
    """Why an arm failed, or None."""
    last: dict[str, Any] = next((row for row in reversed(self.rows) if row.get("arm") == arm), {})
    return last["reason"] if last.get("event") == "failed" else None

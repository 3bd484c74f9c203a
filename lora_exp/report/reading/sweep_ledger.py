"""Reads sweep.jsonl for the report: the trials of a sweep, and the runs of each trial of a study."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.report.reading.file_values import LARGEST, MOST_NAMED, parse_object
from lora_exp.runtime.json_lines import current_keys
from lora_exp.runtime.run_files import LEDGER


@dataclass(frozen=True)
class LookLevel:
  """The last look at the verdicts of a sweep that adds seeds until it has an answer (sweep=decide)."""

  level: float  # of its tests
  of_level: float  # the level that all looks of the sweep share
  count: int  # number of looks so far


@dataclass(frozen=True)
class SweepLedger:
  """The facts about a sweep's trials in its ledger; empty for a sweep without a ledger."""

  trials: frozenset[int] = frozenset()  # all trials in it
  study_trials: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (trial of the study, the runs that it trained)
  objectives: tuple[str, ...] = ()  # of the study
  tuning: frozenset[int] = frozenset()  # trials that only choose a value of a tuned setting
  dropped: frozenset[int] = frozenset()  # trials of settings that the sweep dropped during training
  look: LookLevel | None = None  # None: it did not look at the verdicts
  problems: tuple[str, ...] = ()  # damaged lines, a sentence each


def read_sweep_ledger(directory: Path) -> SweepLedger:
  """Reads the ledger of the sweep in `directory`. Damaged lines and unreadable files become `problems`."""
  path = Path(directory) / LEDGER
  if not path.is_file():
    return SweepLedger()
  try:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
  except OSError as error:
    return SweepLedger(problems=(f"{LEDGER} cannot be read ({type(error).__name__})",))
  trials: set[int] = set()
  tuning: set[int] = set()
  dropped: set[int] = set()
  looks: list[dict[str, Any]] = []
  study: dict[int, tuple[int, ...]] = {}
  objectives: tuple[str, ...] = ()
  problems: list[str] = []
  for number, line in enumerate(lines, start=1):
    row, problem = _parsed(line)
    if problem:
      problems.append(f"{LEDGER}: line {number} {problem}")
      continue
    trials.update(_numbers(row))
    tuning.update(row.get("tuning", ()))
    if row.get("event") == "trial":
      study[row["study_trial"]] = tuple(row["runs"])
    elif row.get("event") == "study":
      objectives = tuple(row.get("objectives") or ())
    elif row.get("event") == "dropped":
      dropped.update(row.get("trials", ()))
    elif row.get("event") == "look":
      looks.append(row)
  look = LookLevel(looks[-1]["level"], looks[-1]["of_level"], len(looks)) if looks else None
  return SweepLedger(frozenset(trials), tuple(study.items()), objectives, frozenset(tuning), frozenset(dropped), look,
                     _shortened(problems))


def _parsed(line: str) -> tuple[dict[str, Any], str]:
  """The row in a line, and its problem or ''."""
  row = parse_object(line)
  if row is None:
    return {}, "is not a JSON object"
  row = current_keys(row)
  return row, _problem(row)


def _problem(row: dict[str, Any]) -> str:
  """The problem of a row of the ledger, or ''."""
  for name in ("trial", "study_trial"):
    if name in row and not _is_number(row[name]):
      return f"has {name}={shown(row[name])}, which must be the number of a trial"
  for name in ("trials", "runs", "tuning"):
    if name in row and not (isinstance(row[name], list) and all(_is_number(n) for n in row[name])):
      return f"has {name}={shown(row[name])}, which must be a list of trials"
  if row.get("event") == "trial" and not ("study_trial" in row and row.get("runs")):
    return "is a trial of a study without the runs that it trained"
  if row.get("event") == "look" and not (_is_level(row.get("level")) and _is_level(row.get("of_level"))):
    return "is a look at the verdicts without the level of its tests"
  if not all(isinstance(name, str) for name in _words(row.get("objectives"))):
    return f"has objectives={shown(row['objectives'])}, which must be a list of names"
  return ""


def _words(value: Any) -> Sequence[Any]:
  return value if isinstance(value, list) else [] if value is None else [None]


def _is_number(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _is_level(value: Any) -> bool:
  return isinstance(value, float) and 0 < value < 1


def _numbers(row: dict[str, Any]) -> list[int]:
  """The trials in a row."""
  lists = [number for name in ("trials", "runs", "tuning") for number in row.get(name, ())]
  return [row["trial"], *lists] if "trial" in row else lists


def _shortened(problems: list[str]) -> tuple[str, ...]:
  more = len(problems) - MOST_NAMED
  return (*problems[:MOST_NAMED], *([f"{LEDGER}: {more} more lines are damaged"] if more > 0 else []))

"""sweep.jsonl as the report reads it: which trials a sweep has, and which of them each trial of a study trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.report.reading.file_values import LARGEST, MOST_NAMED, parse_object
from lora_exp.runtime.json_lines import current_keys
from lora_exp.runtime.run_files import LEDGER


@dataclass(frozen=True)
class SweepLedger:
  """What the ledger of a sweep says about its trials; empty for a sweep without one."""

  trials: frozenset[int] = frozenset()  # every trial that it names
  study_trials: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (trial of the study, the runs that it trained)
  objectives: tuple[str, ...] = ()  # of the study
  tuning: frozenset[int] = frozenset()  # trials that chose a value of a tuned setting, and score nothing
  problems: tuple[str, ...] = ()  # damaged lines, a sentence each


def read_sweep_ledger(directory: Path) -> SweepLedger:
  """The ledger of the sweep in `directory`. Damaged lines are left out and named; so is an unreadable file."""
  path = Path(directory) / LEDGER
  if not path.is_file():
    return SweepLedger()
  try:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
  except OSError as error:
    return SweepLedger(problems=(f"{LEDGER} cannot be read ({type(error).__name__})",))
  trials: set[int] = set()
  tuning: set[int] = set()
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
  return SweepLedger(frozenset(trials), tuple(study.items()), objectives, frozenset(tuning), _shortened(problems))


def _parsed(line: str) -> tuple[dict[str, Any], str]:
  """The row in a line, and what is wrong with it or an empty text."""
  row = parse_object(line)
  if row is None:
    return {}, "is not a JSON object"
  row = current_keys(row)
  return row, _problem(row)


def _problem(row: dict[str, Any]) -> str:
  """What is wrong with a row of the ledger, or an empty text."""
  for name in ("trial", "study_trial"):
    if name in row and not _is_number(row[name]):
      return f"has {name}={shown(row[name])}, which must be the number of a trial"
  for name in ("trials", "runs", "tuning"):
    if name in row and not (isinstance(row[name], list) and all(_is_number(n) for n in row[name])):
      return f"has {name}={shown(row[name])}, which must be a list of trials"
  if row.get("event") == "trial" and not ("study_trial" in row and row.get("runs")):
    return "is a trial of a study without the runs that it trained"
  if not all(isinstance(name, str) for name in _words(row.get("objectives"))):
    return f"has objectives={shown(row['objectives'])}, which must be a list of names"
  return ""


def _words(value: Any) -> Sequence[Any]:
  return value if isinstance(value, list) else [] if value is None else [None]


def _is_number(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST


def _numbers(row: dict[str, Any]) -> list[int]:
  """The trials that a row names."""
  lists = [number for name in ("trials", "runs", "tuning") for number in row.get(name, ())]
  return [row["trial"], *lists] if "trial" in row else lists


def _shortened(problems: list[str]) -> tuple[str, ...]:
  more = len(problems) - MOST_NAMED
  return (*problems[:MOST_NAMED], *([f"{LEDGER}: {more} more lines are damaged"] if more > 0 else []))

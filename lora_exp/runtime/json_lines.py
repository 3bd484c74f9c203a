"""Readers of files with one JSON object per line: the metrics of a run and the ledger of a sweep."""

import json
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.runtime.run_files import LEDGER, METRICS_FILE


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
  """Reads the rows of a run's metrics.jsonl, in order, without an incomplete last line. Raises InputError."""
  path = Path(run_dir) / METRICS_FILE
  if not path.is_file():
    raise InputError(f"{path} does not exist; name the directory of a run")
  return [row for _, row in parse_metrics(path)]


def parse_metrics(path: Path) -> list[tuple[str, dict[str, Any]]]:
  """As `parse_lines`, for a metrics.jsonl. Raises InputError if a step is no whole number, or a split is no word."""
  lines = parse_lines(path)
  for number, (_, row) in enumerate(lines, start=1):
    for key, kind, words in (("step", int, "a whole number"), ("split", str, "a word")):
      if key in row and not isinstance(row[key], kind):
        raise InputError(f"{path}: line {number}: {key} must be {words}; delete that line")
  return lines


def read_ledger(sweep_dir: Path) -> list[dict[str, Any]]:
  """Reads the rows of a sweep's ledger, in order, without an incomplete last line; empty if there is no ledger.

  Rows of version 0.1.0 are converted to the current keys. Raises InputError.
  """
  path = Path(sweep_dir) / LEDGER
  return [current_keys(row) for _, row in parse_lines(path)] if path.is_file() else []


def current_keys(row: dict[str, Any]) -> dict[str, Any]:
  """Converts `row` to the current keys: in 0.1.0 a trial was called `arm`, and `trial` was a trial of a study."""
  if "arm" in row or "arms" in row:
    return {{"arm": "trial", "arms": "trials"}.get(key, key): value for key, value in row.items()}
  if row.get("event") in ("trial", "told") and "trial" in row:
    return {"study_trial" if key == "trial" else key: value for key, value in row.items()}
  return row


def parse_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
  """Returns (line, row) of each complete line of the file, ignoring an incomplete last line. Raises InputError."""
  lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
  rows: list[tuple[str, dict]] = []
  for number, line in enumerate(lines[:-1], start=1):
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      row = None
    if not isinstance(row, dict):
      raise InputError(f"{path}: line {number} is not a JSON object; delete that line")
    rows.append((line, row))
  return rows

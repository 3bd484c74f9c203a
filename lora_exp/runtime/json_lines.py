"""Readers of JSON-lines files: the metrics of a run and the ledger of a sweep."""

import json
from pathlib import Path

from lora_exp.config.errors import InputError

METRICS = "metrics.jsonl"
LEDGER = "sweep.jsonl"


def read_metrics(run_dir: Path) -> list[dict]:
  """The rows of a run's metrics.jsonl, in order, without an incomplete last line. Raises InputError."""
  path = Path(run_dir) / METRICS
  if not path.is_file():
    raise InputError(f"{path} does not exist; name the directory of a run")
  return [row for _, row in parse_lines(path)]


def read_ledger(sweep: Path) -> list[dict]:
  """The rows of a sweep's ledger, in order, without an incomplete last line; [] without a ledger. Raises InputError."""
  path = Path(sweep) / LEDGER
  return [row for _, row in parse_lines(path)] if path.is_file() else []


def parse_lines(path: Path) -> list[tuple[str, dict]]:
  """(line, row) for each complete line of `path`. Raises InputError for a line that is not a JSON object."""
  lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
  rows: list[tuple[str, dict]] = []
  for number, line in enumerate(lines[:-1], start=1):  # text after the last newline is an incomplete line
    try:
      row = json.loads(line)
    except ValueError:
      row = None
    if not isinstance(row, dict):
      raise InputError(f"{path}: line {number} is not a JSON object; delete that line")
    rows.append((line, row))
  return rows

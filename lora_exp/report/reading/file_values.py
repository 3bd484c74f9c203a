"""Parsing and validation of a run's files, with a sentence for each invalid value.

A file with an invalid value is ignored as a whole, because a run with an invalid rank belongs to no setting. In
metrics.jsonl only the damaged lines are ignored.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from lora_exp.config.conversion import TypeConverter, shown
from lora_exp.config.schema import Config
from lora_exp.runtime.yaml_text import safe_load

LARGEST = 2**63  # larger integers are invalid in every file
MOST_NAMED = 3  # maximum number of problems listed for one file
NUMBER, TEXT, ANY = "a number", "a text", "a value"
NUMBERS = {"*": NUMBER}  # any names with a number, or null, each
# The shape of summary.json. Fields that are not listed may be anything, and any may be missing or null.
SUMMARY_SHAPE: dict[str, Any] = {
  "status": TEXT,
  **dict.fromkeys(("steps", "tokens", "peak_memory_bytes", "tokens_per_s", "flops_per_token"), NUMBER),
  **dict.fromkeys(("losses", "parameters", "seconds", "kept_ranks"), NUMBERS),
  "scores": {"*": NUMBERS},
  "halves": {"*": {"*": NUMBERS}},
  "targets": [{"path": TEXT, "fan_in": NUMBER, "fan_out": NUMBER, "rank": NUMBER, "alpha": NUMBER, "scale": NUMBER}],
  "fingerprints": {"*": TEXT},
  "base": {"*": ANY},
  "method": {"name": TEXT, "reference": TEXT},
}
STATUSES = ("done", "pruned", "stopped", "diverged", "failed", "inactive", "unfinished")


def parse_json(text: str) -> Any:
  """Parses JSON; integers with more than 20 digits become floats. Raises ValueError."""
  try:
    return json.loads(text, parse_int=_parse_integer)
  except RecursionError:
    raise ValueError("nested too deeply") from None


def _parse_integer(text: str) -> int | float:
  return int(text) if len(text) <= 20 else float(text)


def parse_yaml(text: str) -> Any:
  """Parses YAML. Raises ValueError or yaml.YAMLError."""
  try:
    return safe_load(text)
  except (RecursionError, TypeError) as error:  # TypeError: a mapping as a key
    raise ValueError(str(error)) from None


def read_mapping(path: Path, parse: Callable[[str], Any], problems: list[str]) -> dict[str, Any]:
  """Reads the mapping in a file; {} with an entry in `problems` if there is none."""
  try:
    values = parse(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    problems.append(f"there is no {path.name}")
    return {}
  except (ValueError, yaml.YAMLError, OSError) as error:
    problems.append(f"{path.name} cannot be read ({type(error).__name__})")
    return {}
  if not isinstance(values, dict):
    problems.append(f"{path.name} does not contain a mapping")
    return {}
  return {str(key): value for key, value in values.items()}


def read_config(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads the nested settings in config.yaml; {} with entries in `problems` if one has a wrong type."""
  values = read_mapping(path, parse_yaml, problems)
  found: list[str] = []
  try:
    checked = _checked_settings(Config, values, "", found)
  except RecursionError:  # an anchor that contains itself
    checked, found = {}, ["a setting contains itself"]
  return checked if not _add_problems(path.name, found, problems) else {}


def read_summary(path: Path, problems: list[str]) -> dict[str, Any]:
  """Reads summary.json; {} with entries in `problems` if a field has a wrong type."""
  values = read_mapping(path, parse_json, problems)
  found = shape_problems(values, SUMMARY_SHAPE)
  if values and not found and values.get("status") not in STATUSES:
    found.append(f"status={shown(values.get('status'))}: must be one of {', '.join(STATUSES)}")
  return values if not _add_problems(path.name, found, problems) else {}


def read_metric_rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
  """Reads the rows of metrics.jsonl, without an incomplete last line and damaged lines, which `problems` lists."""
  if not path.is_file():
    return []
  rows: list[dict[str, Any]] = []
  found: list[str] = []
  try:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
  except OSError as error:
    problems.append(f"{path.name} cannot be read ({type(error).__name__})")
    return []
  for number, line in enumerate(lines[:-1], start=1):
    row, problem = parse_object(line), ""
    problem = "is not a JSON object" if row is None else row_problem(row)
    if problem:
      found.append(f"line {number} {problem}")
    elif row is not None:
      rows.append(row)
  _add_problems(path.name, found, problems)
  return rows


def parse_object(line: str) -> dict[str, Any] | None:
  """The JSON object in a line; None if it is not an object."""
  try:
    row = parse_json(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) else None


def row_problem(row: Mapping[str, Any]) -> str:
  """The problem of a row of metrics.jsonl, or ''."""
  step, split = row.get("step"), row.get("split")
  if not isinstance(step, int) or isinstance(step, bool) or step < 0:
    return f"has step={shown(step)}, which must be a whole number from 0"
  if not isinstance(split, str):
    return "has no split" if split is None else f"has split={shown(split)}, which must be train, eval or retain"
  wrong = [name for name, value in row.items() if name != "split" and not _has_type(value, NUMBER)]
  return f"has {wrong[0]}={shown(row[wrong[0]])}, which must be a number" if wrong else ""


def shape_problems(value: Any, shape: Any, path: str = "") -> list[str]:
  """A sentence for each part of `value` whose type differs from `shape`; null is valid for every shape.

  A shape is NUMBER, TEXT or ANY; a mapping of names to shapes ("*": of every name); or a list with the shape of the
  entries.
  """
  if value is None:
    return []
  if isinstance(shape, str):
    return [] if _has_type(value, shape) else [f"{path}={shown(value)}: must be {shape}"]
  if isinstance(shape, list):
    if not isinstance(value, list):
      return [f"{path}={shown(value)}: must be a list"]
    return [text for i, entry in enumerate(value) for text in _entry_problems(entry, shape[0], f"{path}[{i}]")]
  if not isinstance(value, dict):
    return [f"{path}={shown(value)}: must be a mapping"]
  problems = []
  for name, entry in value.items():
    below = shape.get(name, shape.get("*", ANY))
    problems += shape_problems(entry, below, f"{path}.{name}" if path else str(name))
  return problems


def _entry_problems(entry: Any, shape: Any, path: str) -> list[str]:
  return [f"{path}=null: must be a mapping"] if entry is None else shape_problems(entry, shape, path)


def _has_type(value: Any, word: str) -> bool:
  if value is None or word == ANY:
    return True
  if word == TEXT:
    return isinstance(value, str)
  return isinstance(value, int | float) and not isinstance(value, bool) and abs_at_most(value, LARGEST)


def abs_at_most(value: float, bound: int) -> bool:
  """Whether a number is within ±`bound`; a float always is."""
  return isinstance(value, float) or abs(value) <= bound


@cache
def _hints(cls: type) -> dict[str, Any]:
  """The types of a dataclass' fields, without `| None`."""
  return get_type_hints(cls)


def _group_class(hint: Any) -> type | None:
  """The dataclass of a group of settings, also of one that may be null; None for a plain setting."""
  if get_origin(hint) in (Union, UnionType):
    hint = next(t for t in get_args(hint) if t is not type(None))
  return hint if is_dataclass(hint) and isinstance(hint, type) else None


def _checked_settings(cls: type, values: Mapping[str, Any], prefix: str, found: list[str]) -> dict[str, Any]:
  """Converts `values` of the group `cls`, with numeric strings as numbers; adds values of a wrong type to `found`.

  Settings unknown to this version are returned unchanged.
  """
  checked: dict[str, Any] = {}
  for key, value in values.items():
    path, hint = f"{prefix}{key}", _hints(cls).get(str(key))
    group = _group_class(hint)
    if isinstance(value, int) and not abs_at_most(value, LARGEST):
      found.append(f"{path}={shown(value)}: is too large")
    elif group is not None and isinstance(value, dict):
      checked[str(key)] = _checked_settings(group, value, f"{path}.", found)
    else:
      checked[str(key)] = _checked_setting(hint, value, path, found)
  return checked


def _checked_setting(hint: Any, value: Any, path: str, found: list[str]) -> Any:
  if path == "lora.targets":
    words = value if isinstance(value, list) else [value]
    if not all(isinstance(word, str) for word in words):
      found.append(f"{path}={shown(value)}: must be a preset, a pattern, or a list of them")
    return value
  if hint is None:
    return value
  converter = TypeConverter()
  try:
    converted = converter.convert(hint, value, path)
  except (OverflowError, TypeError, ValueError):
    converter.problems.append(f"{path}={shown(value)}: cannot be read")
  found += converter.problems
  return converted if isinstance(value, str) and not converter.problems else value


def _add_problems(file: str, found: list[str], problems: list[str]) -> bool:
  """Adds one sentence for all problems of a file; returns whether there were any."""
  if found:
    more = f", and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
    problems.append(f"{file}: {'; '.join(found[:MOST_NAMED])}{more}")
  return bool(found)


def finite(value: Any) -> float | None:
  """`value` if it is a finite number, else None."""
  if isinstance(value, bool) or not isinstance(value, int | float) or not abs_at_most(value, LARGEST):
    return None
  return value if math.isfinite(value) else None

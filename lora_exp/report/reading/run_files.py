"""Reads the runs of a sweep from its directory; a missing or failed run is recorded with its reason."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config import InputError
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.json_lines import read_metrics

TABLES = ("lora.rank_pattern", "lora.alpha_pattern", "model.arch.rope_scaling")  # settings whose value is a mapping
LOGS = ("lora_exp.log",)
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it was built


def read_sweep(directory: Path) -> list[RunRecord]:
  """Every trial of the sweep in `directory`, by number; a number that is left out is a trial that is missing.

  Raises InputError if it holds no run.
  """
  directory = Path(directory)
  folders = [path for path in sorted(directory.iterdir()) if path.is_dir() and _is_run(path)]
  if not folders:
    one = (directory / "config.yaml").is_file()
    raise InputError(f"run={directory}: " + (
      "is one run, and its picture is plots/loss.png; give the directory of a sweep" if one else
      "holds no runs (no folder 0, 1, …); give the directory of a sweep, as outputs/sweeps/DAY/TIME-NAME"))
  numbered = {int(path.name): path for path in folders if path.name.isdecimal()}
  named = [path for path in folders if not path.name.isdecimal()]
  count = max(numbered, default=-1) + 1
  trials = [read_run(n, numbered[n]) if n in numbered else RunRecord(n, str(n), "missing", "there is no such folder")
          for n in range(count)]
  return trials + [read_run(count + n, path) for n, path in enumerate(named)]


def _is_run(path: Path) -> bool:
  return path.name.isdecimal() or any((path / name).exists() for name in ("config.yaml", "summary.json"))


def read_run(number: int, path: Path) -> RunRecord:
  """The trial in the directory `path`, as far as its files go."""
  problems: list[str] = []
  config = flat(_file(path / "config.yaml", partial(yaml.load, Loader=LOADER), problems))
  found = (path / "summary.json").is_file()
  summary = _file(path / "summary.json", json.loads, problems) if found else {}
  metrics: list[dict] = []
  if (path / "metrics.jsonl").is_file():
    try:
      metrics = [row for row in read_metrics(path) if isinstance(row.get("step"), int)]
    except InputError as error:
      problems.append(str(error).replace(f"{path}/", ""))
  status = str(summary.get("status", "failed"))
  trial = RunRecord(number, path.name, status, None, config, summary, metrics)
  trial.reason = _reason(trial, path, problems)
  if not found and metrics and not logged_error(path):
    trial.status = "unfinished"
  elif status == "done" and not (config and summary):
    trial.status = "failed"
  return trial


def _file(path: Path, parse: Any, problems: list[str]) -> dict:
  """The mapping in a file; {} with a problem if there is none."""
  try:
    values = parse(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    problems.append(f"there is no {path.name}")
    return {}
  except (ValueError, yaml.YAMLError, OSError) as error:
    problems.append(f"{path.name} cannot be read ({type(error).__name__})")
    return {}
  if not isinstance(values, dict):
    problems.append(f"{path.name} holds no mapping")
    return {}
  return values


def _reason(trial: RunRecord, path: Path, problems: list[str]) -> str | None:
  """Why the trial is not counted, or what is damaged in it."""
  last = max((row["step"] for row in trial.metrics), default=0)
  told = logged_error(path)
  if problems and trial.status in ("done", "failed"):
    return "; ".join([*([told] if told else []), *problems])
  if trial.status == "done":
    return None if trial.outcome is not None else "its held-out loss is not a finite number"
  if trial.status == "pruned":
    return str(trial.summary.get("reason"))
  if trial.status == "stopped":
    return f"stopped at step {last} of {trial.summary.get('steps', '?')}"
  if told:
    return told
  if trial.status == "diverged":
    return f"the loss was no finite number after step {last}"
  if not trial.summary:
    return f"there is no summary.json: killed, or still training, after step {last}"
  return "no error was logged"


def logged_error(path: Path) -> str | None:
  """The last error in the run's log, its first line, without the path of the sweep."""
  for file in (path / name for name in LOGS):
    if file.is_file():
      entries = re.split(r"^(?=\d{4}-\d\d-\d\d \S+ [A-Z]+ \S+: )", file.read_text("utf-8", "replace"), flags=re.M)
      errors = [lines for entry in entries if " ERROR " in (lines := entry.strip().splitlines() or [""])[0]]
      if errors:
        first, last = errors[-1][0].partition(" ERROR ")[2].partition(": ")[2], errors[-1][-1]
        said = f"a bug: {last}" if first == "bug" else first  # whose traceback ends with what it was
        return said.replace(f"{path.parent}/", "").strip()
  return None


def flat(node: dict, prefix: str = "") -> dict[str, Any]:
  """Nested settings by dotted path; lists become text, as a table shows them."""
  found: dict[str, Any] = {}
  for key, value in node.items():
    path = f"{prefix}{key}"
    if isinstance(value, dict) and path not in TABLES:
      found |= flat(value, f"{path}.")
    elif isinstance(value, list):
      found[path] = ",".join(map(str, value))
    else:
      found[path] = json.dumps(value, sort_keys=True) if isinstance(value, dict) else value
  return found

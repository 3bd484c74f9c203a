"""Reads the runs of a sweep from its directory. A missing or failed run is recorded with its reason."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.report.reading.agreement import edited_settings, other_losses
from lora_exp.report.reading.document_losses import DocumentLosses, read_document_losses
from lora_exp.report.reading.file_values import read_config, read_metric_rows, read_summary
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.reading.sweep_ledger import read_sweep_ledger
from lora_exp.report.reading.trial_folders import is_run, trial_folders
from lora_exp.runtime.run_files import CONFIG, METRICS_FILE, SUMMARY

MAPPINGS = ("lora.rank_pattern", "lora.alpha_pattern", "model.arch.rope_scaling")  # settings whose value is a mapping
LOG = "lora_exp.log"
ENTRY = re.compile(r"^(?=\d{4}-\d\d-\d\d \S+ [A-Z]+ \S+: )", re.MULTILINE)  # the start of a log entry


def read_sweep(directory: Path) -> list[RunRecord]:
  """Reads every run of the sweep in `directory`, by number; a trial without a directory is a missing run.

  Raises InputError if it contains no runs.
  """
  directory = Path(directory)
  ledger = read_sweep_ledger(directory)
  folders = trial_folders(directory, ledger)
  if not folders.numbered and not folders.named:
    if is_run(directory):
      problem = ("is one run, and its plot is plots/loss.png; give the directory of a sweep, or compare it with "
                 "others: task=compare runs='[DIR,DIR]'")
    else:
      problem = "contains no runs (no folder 0, 1, …); give a sweep directory, such as outputs/sweeps/DAY/TIME-NAME"
    raise InputError(f"run={directory}: {problem}")
  records = [read_run(n, path) for n, path in folders.numbered.items()]
  records += [RunRecord(n, str(n), "missing", "there is no such folder") for n in folders.missing]
  first = max((run.number for run in records), default=-1) + 1
  records += [read_run(first + n, path) for n, path in enumerate(folders.named)]
  records = [replace(run, tunes=run.number in ledger.tuning, dropped=run.number in ledger.dropped) for run in records]
  return sorted(records, key=_number)


def _number(run: RunRecord) -> int:
  return run.number


def read_run(number: int, path: Path) -> RunRecord:
  """Reads the run in the directory `path`. Missing or damaged files are empty in the record and named in its reason."""
  problems: list[str] = []
  config = flatten_settings(read_config(path / CONFIG, problems))
  has_summary = (path / SUMMARY).is_file()
  summary = read_summary(path / SUMMARY, problems) if has_summary else {}
  metrics = read_metric_rows(path / METRICS_FILE, problems)
  error = logged_error(path)
  run = RunRecord(number, path.name, str(summary.get("status") or "failed"), None, config, summary, metrics)
  if run.status == "done":
    run = replace(run, documents=_read_documents(path, run.exported_step, problems))
    edited = edited_settings(run, path)
    problems += [*edited, *other_losses(run)]
    if edited:
      return replace(run, status="failed", reason=_reason(run, error, problems))
  reason = _reason(run, error, problems)
  if not has_summary and metrics and not error:
    return replace(run, status="unfinished", reason=reason)
  if run.status == "done" and not (config and summary):
    return replace(run, status="failed", reason=reason)
  return replace(run, reason=reason)


def _read_documents(path: Path, exported_step: int, problems: list[str]) -> dict[str, DocumentLosses]:
  """The losses and scores of the held-out documents by metric; {}, with an entry in `problems`, if they are damaged."""
  try:
    return read_document_losses(path, exported_step)
  except ValueError as error:
    problems.append(str(error))
    return {}


def _reason(run: RunRecord, error: str | None, problems: list[str]) -> str | None:
  """Why the run is not counted, or which files are damaged. `error` is the last one in its log."""
  if problems and run.status in ("done", "failed"):
    return "; ".join([*([error] if error else []), *problems])
  if run.status == "done":
    return None if run.exported("loss") is not None else "its held-out loss is not a finite number (summary.json)"
  if run.status == "pruned":
    return str(run.summary.get("reason"))
  if run.status == "stopped":
    return f"stopped at step {run.last_step} of {run.summary.get('steps', '?')}"
  if error:
    return error
  if run.status == "diverged":
    return f"the loss was not a finite number after step {run.last_step}"
  if not run.summary:
    return f"there is no summary.json: killed, or still training, after step {run.last_step}"
  return "no error was logged"


def logged_error(path: Path) -> str | None:
  """The first line of the last error in the run's log, without the path of the sweep; None without an error."""
  log = path / LOG
  if not log.is_file():
    return None
  entries = [entry.strip().splitlines() for entry in ENTRY.split(log.read_text("utf-8", "replace")) if entry.strip()]
  errors = [lines for lines in entries if " ERROR " in lines[0]]
  if not errors:
    return None
  message = errors[-1][0].partition(" ERROR ")[2].partition(": ")[2]
  if message == "bug":  # the last line of its traceback is the exception
    message = f"a bug: {errors[-1][-1]}"
  return message.replace(f"{path.parent}/", "").strip()


def flatten_settings(node: dict, prefix: str = "") -> dict[str, Any]:
  """Flattens nested settings to dotted paths; lists and the MAPPINGS become text."""
  settings: dict[str, Any] = {}
  for key, value in node.items():
    path = f"{prefix}{key}"
    if isinstance(value, dict) and path not in MAPPINGS:
      settings |= flatten_settings(value, f"{path}.")
    elif isinstance(value, dict):
      settings[path] = json.dumps(value, sort_keys=True)
    elif isinstance(value, list):
      settings[path] = ",".join(map(str, value))
    else:
      settings[path] = value
  return settings

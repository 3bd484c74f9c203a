"""The runs and sweeps below a directory, from config.yaml and summary.json alone."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lora_exp.config.schema import FilterConfig
from lora_exp.report.reading.data_labels import last_part, source_label
from lora_exp.report.reading.file_values import read_config, read_summary
from lora_exp.report.reading.run_reader import flatten_settings
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.reading.trial_folders import is_run
from lora_exp.runtime.locks import is_locked
from lora_exp.runtime.run_files import CONFIG, LEDGER, MULTIRUN, SUMMARY

DEEPEST = 6  # levels of directories that are searched
DAY = 86400.0  # seconds


@dataclass(frozen=True)
class IndexedRun:
  """A run, or a sweep with its trials."""

  path: Path
  runs: Sequence[RunRecord]  # one for a run
  is_sweep: bool

  @property
  def status(self) -> str:
    """The status of a run; for a sweep, the number of finished trials."""
    if not self.is_sweep:
      return self.runs[0].status
    done = sum(run.status == "done" for run in self.runs)
    return f"{done}/{len(self.runs)} done"

  @property
  def loss(self) -> float | None:
    """The held-out loss of the exported state; for a sweep, the lowest."""
    losses = map(exported_loss, self.runs)
    return min((loss for loss in losses if loss is not None), default=None)

  def values(self, key: str) -> str:
    """The values of a setting: one, a few, or the smallest and the largest of many numbers."""
    values = list(dict.fromkeys(LABELS[key](run) for run in self.runs if run.config))
    numbers = [value for value in values if isinstance(value, int | float)]
    if len(values) > 2 and len(numbers) == len(values):
      return f"{min(numbers)}-{max(numbers)}"
    return ", ".join(map(str, values[:3])) + (", …" if len(values) > 3 else "")


def find_runs(root: Path) -> list[IndexedRun]:
  """The runs and sweeps in `root` and below it, by path. Symbolic links are not followed."""
  return sorted(_found(root, DEEPEST), key=_path)


def _path(entry: IndexedRun) -> Path:
  return entry.path


def _found(directory: Path, levels: int) -> Iterator[IndexedRun]:
  if is_run(directory):
    yield IndexedRun(directory, [_read(directory)], is_sweep=False)
    return
  folders = sorted(path for path in directory.iterdir() if _is_folder(path))
  trials = [path for path in folders if is_run(path)]
  numbered = any(path.name.isdecimal() for path in trials)
  if numbered or any((directory / name).is_file() for name in (LEDGER, MULTIRUN)):
    if trials:
      yield IndexedRun(directory, [_read(path) for path in trials], is_sweep=True)
    return
  for path in folders if levels else ():
    yield from _found(path, levels - 1)


def _is_folder(path: Path) -> bool:
  return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _read(directory: Path) -> RunRecord:
  """The record of a run without its metrics. A run without a summary is training if its lock is held."""
  problems: list[str] = []
  config = flatten_settings(read_config(directory / CONFIG, problems))
  summary = read_summary(directory / SUMMARY, problems) if (directory / SUMMARY).is_file() else {}
  status = str(summary.get("status") or ("damaged" if problems else "unfinished"))
  if is_locked(directory):
    status = "training"
  return RunRecord(0, str(directory), status, "; ".join(problems) or None, config, summary)


def exported_loss(run: RunRecord) -> float | None:
  """The held-out loss of the exported state over all held-out documents; None unless the run is done."""
  if run.status != "done":
    return None
  name = "base" if run.method.trains_nothing else "final" if run.config.get("train.export") == "last" else "best"
  return run.number_at("losses", name)


def matching(entries: Sequence[IndexedRun], wanted: FilterConfig) -> list[IndexedRun]:
  """The entries with a run that matches every setting of `wanted`."""
  return [entry for entry in entries if any(matches(entry, run, wanted) for run in entry.runs)]


def matches(entry: IndexedRun, run: RunRecord, wanted: FilterConfig) -> bool:
  """Whether a run of `entry` matches every setting of `wanted`."""
  patterns = {"model": wanted.model, "data": wanted.data, "method": wanted.method}
  texts = {key: str(LABELS[key](run)) for key in patterns if run.config} | {
    "status": run.status, "name": entry.path.name}  # fmt: skip
  patterns |= {"status": wanted.status, "name": wanted.name}
  return (
    all(fnmatch(texts.get(key, ""), f"*{pattern}*") for key, pattern in patterns.items() if pattern is not None)
    and (wanted.rank is None or run.config.get("lora.rank") == wanted.rank)
    and (wanted.days is None or time.time() - last_change(Path(run.path)) <= wanted.days * DAY)
  )


def last_change(run_dir: Path) -> float:
  """When the run last wrote its summary, or else its config; seconds since 1970."""
  times = [(run_dir / name).stat().st_mtime for name in (SUMMARY, CONFIG) if (run_dir / name).is_file()]
  return times[0] if times else run_dir.stat().st_mtime


def _model(run: RunRecord) -> str:
  weights = run.config.get("model.weights") if run.config.get("model.base") == "weights" else None
  return last_part(weights) if weights else str(run.config.get("model.family"))


def _data(run: RunRecord) -> str:
  return source_label(run, "data")


def _method(run: RunRecord) -> str:
  return str(run.config.get("lora.method"))


def _rank(run: RunRecord) -> Any:
  return run.config.get("lora.rank") if run.method.uses_rank else "-"


def _steps(run: RunRecord) -> Any:
  return run.summary.get("steps") or run.config.get("train.steps") or "-"


LABELS = {"model": _model, "data": _data, "method": _method, "rank": _rank, "steps": _steps}

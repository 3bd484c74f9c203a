"""Comparison of any runs: the verdicts of the report, without a sweep."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_exp.config import InputError
from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.grouping.repeated_trials import repeated_trials
from lora_exp.report.grouping.setting_keys import effective_settings, value_text, varied_keys
from lora_exp.report.page.document import GroupSection, Report
from lora_exp.report.page.settings_table import number_ranges
from lora_exp.report.reading.run_reader import read_run, read_sweep
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.reading.trial_folders import is_run
from lora_exp.runtime.display_paths import display_path


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
  """The runs in `directories`, numbered from 0; a sweep counts with all its trials.

  Raises InputError for fewer than two runs, and for a directory that is neither a run nor a sweep.
  """
  found: list[tuple[Path, RunRecord]] = []
  for directory in directories:
    if is_run(directory):
      found.append((directory, read_run(0, directory)))
    else:
      found += [(directory / run.path, run) for run in read_sweep(directory)]
  unique = {path.resolve(): (path, run) for path, run in found}
  if len(unique) < 2:
    raise InputError("runs: gives one run; a comparison needs two or more, or a sweep")
  return [replace(run, number=n, path=display_path(path)) for n, (path, run) in enumerate(unique.values())]


def compare_runs(runs: Sequence[RunRecord], metric: str, margin: float) -> Report:
  """The findings on `runs`, ranked by `metric`; `margin` is report.margin. Writes nothing."""
  groups = make_groups(runs, METRICS[metric], margin)
  sections = []
  for n, group in enumerate(groups):
    heading = "" if len(groups) == 1 else f"Group {n}: runs {number_ranges([run.number for run in group.runs])}"
    sections.append(GroupSection(group, all_findings(group), [], None, heading, group.why))
  return Report("Comparison", METRICS[metric], list(runs), sections, [], repeated_trials(groups))


def setting_differences(runs: Sequence[RunRecord]) -> dict[str, str]:
  """The settings whose values differ, each with its values and their runs: {"lora.rank": "8: runs 0-2; 16: run 3"}.

  A run whose config or method lacks a setting is not listed under it.
  """
  tables = {run.number: effective_settings(run) for run in runs if run.config}
  differences = {}
  for key in varied_keys(runs):
    numbers: dict[str, list[int]] = {}
    for number, settings in tables.items():
      if key in settings:
        numbers.setdefault(value_text(settings[key]), []).append(number)
    if len(numbers) > 1:
      texts = [f"{value}: run{'s' * (len(n) > 1)} {number_ranges(n)}" for value, n in numbers.items()]
      differences[key] = "; ".join(texts)
  return differences

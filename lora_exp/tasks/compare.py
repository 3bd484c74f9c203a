"""`task=compare runs='[A,B,…]'`: shows the report's verdicts on any runs, and the settings in which they differ."""

from pathlib import Path

from lora_exp.config import Config
from lora_exp.report.page.document import Report
from lora_exp.report.page.terminal import show
from lora_exp.report.run_comparison import compare_runs, read_runs, setting_differences
from lora_exp.runtime import console

MOST_DIFFERENCES = 20  # settings that are shown with their values


def run(cfg: Config) -> Report:
  """Prints the runs, their differences, the table of settings and the findings. Returns the report."""
  runs = read_runs([Path(path) for path in (cfg.runs if isinstance(cfg.runs, list) else [cfg.runs])])
  report = compare_runs(runs, cfg.report.metric or "loss", cfg.report.margin)
  metric = report.metric
  rows = [[run.number, run.path, _digits(run.exported(metric.name), metric.digits), run.status] for run in runs]
  console.show_table("Runs", ["run", "directory", f"held-out {metric.label}", "status"], rows)
  differences = setting_differences(runs)
  shown = dict(list(differences.items())[:MOST_DIFFERENCES])
  if len(differences) > len(shown):
    shown[f"and {len(differences) - len(shown)} more"] = ", ".join(list(differences)[len(shown):])
  console.show_facts("Differences in settings", shown or {"none": "the runs differ in no setting that matters"})
  show(report)
  return report


def _digits(value: float | None, digits: int) -> str | None:
  return None if value is None else f"{value:.{digits}f}"

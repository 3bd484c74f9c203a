"""The table of all trials, as text, including those that are not counted."""

from collections.abc import Mapping, Sequence

from lora_exp.config.metrics import Metric
from lora_exp.report.reading.run_record import SEEDS, RunRecord


def trial_columns(metric: Metric) -> list[str]:
  """The headings."""
  return ["trial", "setting", *_seed_names(), "status", f"held-out {metric.label}", "base", "trainable", "best step",
          "training (s)"]


def trial_rows(runs: Sequence[RunRecord], labels: Mapping[int, str], metric: Metric) -> list[list[str]]:
  """A row for each run, under `trial_columns`; `labels`: id of a run -> its setting."""
  return [_row(run, labels.get(id(run), "-"), metric) for run in runs]


def _row(run: RunRecord, label: str, metric: Metric) -> list[str]:
  seconds = run.number_at("seconds", "train")
  return [
    str(run),
    label,
    *(str(run.config.get(key, "-")) for key in SEEDS),
    run.status,
    _number(run.result(metric.name), metric.digits),
    _number(run.base(metric.name), metric.digits),
    f"{run.trainable:,}" if run.trainable is not None else "-",
    f"{run.best_step}" if run.best_step else "-",
    _number(seconds, 1),
  ]


def _seed_names() -> list[str]:
  return [f"{key.partition('.')[0]} seed" for key in SEEDS]


def _number(value: float | None, digits: int) -> str:
  return "-" if value is None else f"{value:.{digits}f}"

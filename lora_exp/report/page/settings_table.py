"""The table of a group's settings, as text."""

from collections.abc import Sequence

from lora_exp.config.metrics import METRICS, Metric
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.run_record import RunRecord


def setting_columns(group: Group) -> list[str]:
  """The headings: the metric that ranks the settings, their costs, then every other metric that a trial has."""
  ranking = ["setting", "trials", "seeds", score_column(group), "gain", "% of full", "trainable", "%"]
  return [*ranking, *(metric.label for metric in _other_metrics(group))]


def score_column(group: Group) -> str:
  """The heading of the metric that ranks the settings."""
  return f"held-out {group.metric.label}"


def _other_metrics(group: Group) -> list[Metric]:
  others = [metric for metric in METRICS.values() if metric is not group.metric]
  return [metric for metric in others if any(run.result(metric.name) is not None for run in group.runs)]


def setting_rows(group: Group) -> list[list[str]]:
  """A row for each setting of the group, under `setting_columns`."""
  others = _other_metrics(group)
  return [[*_row(group, setting), *(_cell(setting, metric) for metric in others)] for setting in group.settings
          if not setting.only_tuned]


def _cell(setting: Setting, metric: Metric) -> str:
  """The mean of a metric over the counted trials."""
  def result(run: RunRecord) -> float | None:
    return run.result(metric.name)

  return setting.estimate(result).text(metric.digits)


def _row(group: Group, setting: Setting) -> list[str]:
  run = next(iter(setting.counted.values()), setting.runs[0])
  percent = run.number_at("parameters", "percent")
  return [
    setting.label,
    number_ranges([run.number for run in setting.runs]),
    f"{setting.seeds}",
    setting.score.text(group.metric.digits),
    setting.gain.text(group.metric.digits),
    group.share(setting).text(1, factor=100),
    f"{setting.trainable:,}" if setting.trainable is not None else "-",
    f"{percent:.3g}" if percent is not None else "-",
  ]


def number_ranges(numbers: Sequence[int]) -> str:
  """Formats sorted numbers and joins consecutive ones: '0-2, 6'."""
  ranges: list[list[int]] = []
  for n in sorted(numbers):
    if ranges and n == ranges[-1][-1] + 1:
      ranges[-1].append(n)
    else:
      ranges.append([n])
  return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)

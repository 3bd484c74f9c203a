"""The table of a group's settings, as text."""

from collections.abc import Sequence

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting

COLUMNS = ("setting", "trials", "seeds", "held-out loss", "gain", "% of full", "trainable", "%")


def setting_rows(group: Group) -> list[list[str]]:
  """A row for each setting of the group, under COLUMNS."""
  return [_row(group, setting) for setting in group.settings]


def _row(group: Group, setting: Setting) -> list[str]:
  trial = next(iter(setting.counted.values()), setting.trials[0])
  percent = trial.number_at("parameters", "percent")
  return [
    setting.label,
    number_ranges([trial.number for trial in setting.trials]),
    f"{setting.seeds}",
    setting.loss.text(),
    setting.gain.text(),
    group.share(setting).text(1, factor=100),
    f"{setting.trainable:,}" if setting.trainable is not None else "-",
    f"{percent:.3g}" if percent is not None else "-",
  ]


def number_ranges(numbers: Sequence[int]) -> str:
  """Sorted numbers with consecutive ones joined, as '0-2, 6'."""
  ranges: list[list[int]] = []
  for n in sorted(numbers):
    if ranges and n == ranges[-1][-1] + 1:
      ranges[-1].append(n)
    else:
      ranges.append([n])
  return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in ranges)

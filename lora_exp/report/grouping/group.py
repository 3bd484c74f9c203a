"""Groups of settings that can be compared with each other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_exp.config.metrics import METRICS, Metric
from lora_exp.config.schema import ReportConfig
from lora_exp.report.estimation.estimates import Estimate, estimate, ratio
from lora_exp.report.grouping.comparability import incomparable
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import (
  distinguishing_keys,
  effective_settings,
  setting_label,
  setting_values,
  varied_keys,
)
from lora_exp.report.reading.run_record import SEEDS, RunRecord
from lora_exp.report.reading.sweep_ledger import LookLevel


@dataclass(frozen=True)
class Group:
  """Settings with the same steps, data, base and dtypes."""

  settings: list[Setting]  # the frozen base first, full fine-tuning last
  metric: Metric  # the metric that ranks the settings
  keys: list[str]  # keys that distinguish the settings
  varied: list[str]  # every key whose values differ in the sweep, seeds included
  why: str = ""  # how the group differs from the sweep's other groups
  margin: float = ReportConfig.margin  # share of the best gain that a setting may be short of it and still be enough
  look: LookLevel | None = None  # the last look at the verdicts during the sweep; the report tests at its level

  @property
  def runs(self) -> list[RunRecord]:
    """All runs of the group, by number."""
    return sorted((run for setting in self.settings for run in setting.runs), key=_number)

  @property
  def adapted(self) -> list[Setting]:
    """The settings with a result, without the references and those that the sweep dropped."""
    return [s for s in self.settings if s.seeds and not s.method.is_reference and not s.dropped]

  @property
  def dropped(self) -> list[Setting]:
    """The settings that the sweep dropped during training, which are not judged."""
    return [s for s in self.settings if s.dropped and not s.only_tuned]

  @property
  def tried(self) -> list[Setting]:
    """`adapted`, the settings of which every seed diverged, and those with tuning trials only."""
    return [s for s in self.settings
            if (s.seeds or s.diverged or s.only_tuned) and not s.method.is_reference and not s.dropped]

  @cached_property
  def full(self) -> Setting | None:
    """Full fine-tuning at its best learning rate; None if no run of it is done."""
    candidates = [s for s in self.settings if s.seeds and s.method.trains_everything]
    return min(candidates, key=penalty, default=None)

  @property
  def base(self) -> float | None:
    """The metric of the base before training, in full precision."""
    values = [run.base(self.metric.name) for run in self.runs if not run.config.get("lora.quant")]
    known = [value for value in values if value is not None]
    return estimate(known).mean if known else None

  @property
  def is_text(self) -> bool:
    """Whether all runs have text data; losses of numeric examples have no unit."""
    return all(run.is_text for run in self.runs)

  @property
  def unit(self) -> str:
    """The unit of the metric."""
    return self.metric.unit if self.is_text else ""

  def levels(self, key: str) -> list[Any]:
    """The sorted values of `key` in the settings, including failed ones but not the references."""
    values = {s.values[key] for s in self.settings if not s.method.is_reference and key in s.values}
    return sorted(values, key=sort_key)

  def share(self, setting: Setting) -> Estimate:
    """Share of full fine-tuning's gain: 0 is the base, 1 is full. Its interval includes the error of full's mean."""
    full = self.full
    if full is None or not setting.seeds:
      return estimate([])
    if setting is full:
      return Estimate(1.0, None, setting.seeds)
    survivors = {seeds: gain for seeds, gain in setting.gains.items() if math.isfinite(gain)}
    share = ratio(survivors, {seeds: gain for seeds, gain in full.gains.items() if math.isfinite(gain)})
    return estimate([]) if share is None else Estimate(share.mean, share.half, share.n)


def sort_key(value: Any) -> tuple:
  """Sort key for the values of a key: null before numbers, and numbers before words."""
  return value is not None, isinstance(value, str), 0 if value is None else value


def make_groups(
  runs: Sequence[RunRecord], metric: Metric = METRICS["loss"], margin: float = ReportConfig.margin,
  look: LookLevel | None = None,
) -> list[Group]:  # fmt: skip
  """The settings of a sweep in groups that can be compared, the largest first; runs without a config are in none."""
  runs = [run for run in runs if run.config]
  varied = varied_keys(runs)
  keys = distinguishing_keys(runs, [key for key in varied if key not in SEEDS])
  clusters: list[list[Setting]] = []
  for setting in _settings(runs, keys, metric):
    for cluster in clusters:
      if not any(incomparable(setting, other) for other in cluster):
        cluster.append(setting)
        break
    else:
      clusters.append([setting])
  clusters.sort(key=_size, reverse=True)
  return [Group(sorted(cluster, key=_order), metric, keys, varied, _difference(cluster, clusters), margin, look)
          for cluster in clusters]


def _settings(runs: Sequence[RunRecord], keys: Sequence[str], metric: Metric) -> list[Setting]:
  """Groups runs that differ only in their seeds into settings."""
  by_settings: dict[tuple, list[RunRecord]] = {}
  for run in runs:
    settings = effective_settings(run)
    identity = tuple(sorted((key, repr(value)) for key, value in settings.items() if key not in SEEDS))
    by_settings.setdefault(identity, []).append(run)
  return [Setting(setting_label(same[0], keys), setting_values(same[0], keys), same, metric)
          for same in by_settings.values()]


def _difference(cluster: list[Setting], clusters: list[list[Setting]]) -> str:
  """The difference between a cluster of settings and the others, in words."""
  others = [other[0] for other in clusters if other is not cluster]
  return "; ".join(dict.fromkeys(why for other in others for why in incomparable(cluster[0], other)))


def _number(run: RunRecord) -> int:
  return run.number


def _size(cluster: list[Setting]) -> int:
  return sum(len(setting.runs) for setting in cluster)


def _order(setting: Setting) -> tuple[int, int]:
  position = 0 if setting.method.trains_nothing else 2 if setting.method.trains_everything else 1
  return position, setting.runs[0].number

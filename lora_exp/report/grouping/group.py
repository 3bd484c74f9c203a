"""Groups of settings that can be compared with each other."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.config.metrics import METRICS, Metric
from lora_exp.report.grouping.comparability import apart
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import distinguishing_keys, label, settings_of, values_of, varied
from lora_exp.report.reading.run_record import SEEDS, RunRecord
from lora_exp.report.statistics.estimates import Estimate, estimate


@dataclass
class Group:
  """Settings that can be compared."""

  settings: list[Setting]
  metric: Metric  # by which they are compared
  keys: list[str]  # that tell them apart
  columns: list[str]  # every key whose values differ in the sweep
  why: str = ""  # what sets it apart from the sweep's other groups
  unread: list[str] = field(default_factory=list)  # adapters that are damaged, a sentence each

  @property
  def trials(self) -> list[RunRecord]:
    return sorted((trial for setting in self.settings for trial in setting.trials), key=lambda trial: trial.number)

  @property
  def adapted(self) -> list[Setting]:
    """Those with a result, apart from the reference lines."""
    return [s for s in self.settings if s.seeds and not s.reference]

  @property
  def full(self) -> Setting | None:
    """Full fine-tuning, at its best rate."""
    found = [s for s in self.settings if s.seeds and s.method == "full"]
    return min(found, key=lambda s: s.penalty, default=None)

  @property
  def base(self) -> float | None:
    """The metric of the base before training."""
    values = [trial.base_metric(self.metric.name) for trial in self.trials if not trial.config.get("lora.quant")]
    found = [value for value in values if value is not None]
    return estimate(found).mean if found else None

  @property
  def has_numbers(self) -> bool:
    """Whether its data is examples of numbers, whose loss has no unit."""
    return any(trial.numbers for trial in self.trials)

  @property
  def unit(self) -> str:
    """The unit of the metric; examples of numbers have none."""
    return "" if self.has_numbers else self.metric.unit

  def levels(self, key: str) -> list[Any]:
    """The values of `key` among adapted settings and those that failed, in order."""
    found = {s.values[key] for s in self.settings if not s.reference and s.values.get(key) is not None}
    return sorted(found, key=lambda v: (isinstance(v, str), v))

  def share(self, setting: Setting) -> Estimate:
    """Share of full fine-tuning's gain over the base: 0 is the base, 1 is full; by seed where full has that seed."""
    full = self.full
    if full is None:
      return estimate([])
    paired = {seeds for seeds in setting.counted if seeds in full.counted}
    if len(paired) < setting.seeds:
      paired = set()

    def share(trial: RunRecord) -> float | None:
      name, result = self.metric.name, trial.result(self.metric.name)
      top = full.scores[trial.seeds] if paired else full.score.mean
      # Of full precision, also for a quantised trial.
      base = full.counted[trial.seeds].base_metric(name) if paired else self.base
      if base is None or result is None or self.metric.sign * (base - top) <= 0:
        return None
      return (base - result) / (base - top)

    return setting.of(share)


def make_groups(trials: Sequence[RunRecord], metric: Metric = METRICS["loss"]) -> list[Group]:
  """The settings of a sweep in groups that can be compared, the largest first; trials without a config are in none."""
  trials = [trial for trial in trials if trial.config]
  columns = varied(trials)
  keys = distinguishing_keys(trials, [key for key in columns if key not in SEEDS])
  groups: dict[tuple, list[RunRecord]] = {}
  for trial in trials:
    config = settings_of(trial)
    identity = tuple(sorted((k, repr(v)) for k, v in config.items() if k not in SEEDS))
    groups.setdefault(identity, []).append(trial)
  made = [Setting(label(trials_, keys), values_of(trials_[0], keys), trials_, metric) for trials_ in groups.values()]
  clusters: list[list[Setting]] = []
  for setting in made:
    fit = next((c for c in clusters if all(not apart(setting, other) for other in c)), None)
    clusters.append([setting]) if fit is None else fit.append(setting)
  clusters.sort(key=lambda c: -sum(len(s.trials) for s in c))
  found = []
  for cluster in clusters:
    others = {why: None for other in clusters if other is not cluster for s in other[:1] for t in cluster[:1]
              for why in apart(t, s)}
    found.append(Group(sorted(cluster, key=_order), metric, keys, columns, "; ".join(others)))
  return found


def _order(setting: Setting) -> tuple:
  return ({"frozen": 0, "full": 2}.get(setting.method, 1), setting.trials[0].number)

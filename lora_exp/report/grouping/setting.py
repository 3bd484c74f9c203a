"""One setting: the runs that differ in their seeds alone."""

from dataclasses import dataclass
from typing import Any

from lora_exp.config.metrics import Metric
from lora_exp.report.grouping.setting_keys import REFERENCES, settings_of
from lora_exp.report.reading.adapter_updates import Overlap
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.statistics.estimates import Estimate, estimate


@dataclass
class Setting:
  """What is compared: the trials with one set of settings, a seed each."""

  label: str
  values: dict[str, Any]  # of the keys that tell settings apart
  trials: list[RunRecord]  # by number
  metric: Metric  # by which settings are compared
  overlap: Overlap | None = None  # of what its seeds learned

  @property
  def method(self) -> str:
    return self.trials[0].method or "?"

  @property
  def reference(self) -> bool:
    """Whether it is a reference line: the frozen base, or full fine-tuning."""
    return self.method in REFERENCES

  @property
  def counted(self) -> dict[tuple, RunRecord]:
    """Seeds -> the first trial that is done with them."""
    found: dict[tuple, RunRecord] = {}
    for trial in self.trials:
      if trial.result(self.metric.name) is not None:
        found.setdefault(trial.seeds, trial)
    return found

  @property
  def scores(self) -> dict[tuple, float]:
    """Seeds -> the metric."""
    values = {seeds: trial.result(self.metric.name) for seeds, trial in self.counted.items()}
    return {seeds: value for seeds, value in values.items() if value is not None}

  @property
  def score(self) -> Estimate:
    """The metric over seeds."""
    return estimate(list(self.scores.values()))

  @property
  def penalties(self) -> dict[tuple, float]:
    """Seeds -> the metric, negated where higher is better: a lower value is better."""
    return {seeds: self.metric.sign * value for seeds, value in self.scores.items()}

  @property
  def penalty(self) -> float:
    """The mean of `penalties`."""
    return self.metric.sign * self.score.mean

  @property
  def gain(self) -> Estimate:
    """How much better the metric is than that of each trial's own base."""
    return self.of(self._gain)

  def _gain(self, trial: RunRecord) -> float | None:
    base, result = trial.base_metric(self.metric.name), trial.result(self.metric.name)
    return None if base is None or result is None else self.metric.sign * (base - result)

  def of(self, value) -> Estimate:
    """The estimate of `value(trial)` over the seeds."""
    return estimate([x for trial in self.counted.values() if (x := value(trial)) is not None])

  @property
  def seeds(self) -> int:
    return len(self.counted)

  @property
  def trainable(self) -> int | None:
    counts = [trial.trainable for trial in [*self.counted.values(), *self.trials]]
    return next((count for count in counts if count is not None), None)

  @property
  def budget(self) -> float | None:
    """`lora.parameters`, by which its rank was chosen; None where the rank was given."""
    return settings_of(self.trials[0]).get("lora.parameters")

  @property
  def names(self) -> str:
    """The counted trials, for an evidence line."""
    return ", ".join(str(trial) for trial in self.counted.values())

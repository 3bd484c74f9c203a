"""One setting: the runs that differ in their seeds alone."""

from dataclasses import dataclass
from typing import Any

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
      if trial.loss is not None:
        found.setdefault(trial.seeds, trial)
    return found

  @property
  def losses(self) -> dict[tuple, float]:
    return {seeds: trial.loss for seeds, trial in self.counted.items() if trial.loss is not None}

  @property
  def loss(self) -> Estimate:
    return estimate(list(self.losses.values()))

  @property
  def gain(self) -> Estimate:
    """Below each trial's own base."""
    return self.of(lambda trial: None if trial.base is None or trial.loss is None else trial.base - trial.loss)

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

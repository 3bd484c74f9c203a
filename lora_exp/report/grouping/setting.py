"""A setting: runs that differ only in their seeds."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_exp.config.metrics import Metric
from lora_exp.report.estimation.estimates import Estimate, estimate
from lora_exp.report.grouping.setting_keys import effective_settings
from lora_exp.report.reading.method_facts import MethodFacts
from lora_exp.report.reading.run_record import RunRecord


@dataclass(frozen=True)
class Setting:
  """The runs with equal settings and different seeds. The report compares settings."""

  label: str
  values: dict[str, Any]  # values of the keys that distinguish settings
  runs: list[RunRecord]  # sorted by number
  metric: Metric  # the metric that ranks settings

  @property
  def method(self) -> MethodFacts:
    return self.runs[0].method

  @cached_property
  def counted(self) -> dict[tuple, RunRecord]:
    """Seeds -> the first finished run with them, without tuning trials.

    Runs with identical losses are one repetition, and the first counts: without dropout, some methods draw nothing from
    train.seed, and their seeds give the same run again.
    """
    counted: dict[tuple, RunRecord] = {}
    losses: set[float] = set()
    for run in self.runs:
      loss = run.result("loss")
      if run.tunes or run.result(self.metric.name) is None or run.seeds in counted or loss in losses:
        continue
      counted[run.seeds] = run
      if loss is not None:
        losses.add(loss)
    return counted

  @property
  def repeats(self) -> int:
    """How many runs with other seeds had the loss of a counted one."""
    done = {run.seeds for run in self.runs if not run.tunes and run.result(self.metric.name) is not None}
    return len(done) - len(self.counted)

  @cached_property
  def diverged(self) -> list[tuple]:
    """The seeds that diverged and were not repeated successfully."""
    runs = [run for run in self.runs if not run.tunes]
    done = {run.seeds for run in runs if run.result(self.metric.name) is not None}
    return list(dict.fromkeys(run.seeds for run in runs if run.status == "diverged" and run.seeds not in done))

  @property
  def seeds(self) -> int:
    """The number of counted seeds."""
    return len(self.counted)

  @property
  def scores(self) -> dict[tuple, float]:
    """Seeds -> the metric."""
    values = {seeds: run.result(self.metric.name) for seeds, run in self.counted.items()}
    return {seeds: value for seeds, value in values.items() if value is not None}

  @cached_property
  def score(self) -> Estimate:
    """The metric over seeds."""
    return estimate(list(self.scores.values()))

  @property
  def penalties(self) -> dict[tuple, float]:
    """Seeds -> the metric, negated where higher is better: a lower penalty is better."""
    return {seeds: self.metric.sign * value for seeds, value in self.scores.items()}

  @property
  def penalty(self) -> float:
    """The mean of `penalties`."""
    return self.metric.sign * self.score.mean

  @property
  def only_tuned(self) -> bool:
    """Whether all its runs are tuning trials, so that it has no score."""
    return all(run.tunes for run in self.runs)

  @property
  def dropped(self) -> bool:
    """Whether the sweep dropped it during training, because it would be far short of the best."""
    return any(run.dropped for run in self.runs)

  @cached_property
  def tuning_penalties(self) -> dict[tuple, float]:
    """Seeds -> the penalty on the tuning half of the held-out documents, for choices."""
    values = {seeds: run.tuning_result(self.metric.name) for seeds, run in self.counted.items()}
    return {seeds: self.metric.sign * value for seeds, value in values.items() if value is not None}

  @property
  def gain(self) -> Estimate:
    """The improvement of the metric over each run's base."""
    return self.estimate(self._gain)

  @cached_property
  def gains(self) -> dict[tuple, float]:
    """Seeds -> the gain over the run's own base; NaN for a seed that diverged."""
    values = {seeds: self._gain(run) for seeds, run in self.counted.items()}
    known = {seeds: value for seeds, value in values.items() if value is not None}
    return known | dict.fromkeys(self.diverged, math.nan)

  def _gain(self, run: RunRecord) -> float | None:
    base, result = run.base(self.metric.name), run.result(self.metric.name)
    if base is None or result is None:
      return None
    return result - base if self.metric.higher_is_better else base - result

  def estimate(self, value: Callable[[RunRecord], float | None]) -> Estimate:
    """The estimate of `value` over the seeds; runs whose value is None are left out."""
    values = (value(run) for run in self.counted.values())
    return estimate([x for x in values if x is not None])

  @property
  def trainable(self) -> int | None:
    """The number of trainable parameters."""
    counts = [run.trainable for run in [*self.counted.values(), *self.runs]]
    return next((count for count in counts if count is not None), None)

  @property
  def budget(self) -> float | None:
    """`lora.parameters`, which determined the rank; None if the rank was given."""
    return effective_settings(self.runs[0]).get("lora.parameters")

  @property
  def trial_numbers(self) -> str:
    """The numbers of the counted runs, for the evidence of a finding."""
    return ", ".join(str(run) for run in self.counted.values())


def penalty(setting: Setting) -> float:
  """The penalty of a setting, as a sort key."""
  return setting.penalty

"""The definition of a study: its search space, the runs of a trial, the objectives, and when trials are pruned.

Imports no optuna, so that a command line can be checked quickly.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.config.metrics import METRICS


@dataclass(frozen=True)
class Choice:
  """A parameter with a list of values, each written as in an override."""

  values: tuple[str, ...]

  @property
  def size(self) -> float:
    return len(self.values)

  def examples(self) -> tuple[str, ...]:
    return self.values


@dataclass(frozen=True)
class Interval:
  """A numeric parameter from `low` to `high`, both included; an integer if both are integers."""

  low: float
  high: float
  step: float | None = None
  log: bool = False  # sampled evenly in its logarithm

  @property
  def integer(self) -> bool:
    return isinstance(self.low, int)

  @property
  def size(self) -> float:
    """The number of values; infinite for real numbers without a step."""
    step = self.step or (1 if self.integer else 0)
    return round((self.high - self.low) / step) + 1 if step else math.inf

  def examples(self) -> tuple[str, ...]:
    return (str(self.low), str(self.high))


@dataclass(frozen=True)
class Study:
  """Everything that defines a study, except for its directory."""

  fixed: list[str]  # overrides of every run
  space: dict[str, Choice | Interval]  # by setting
  repeats: list[list[str]]  # overrides of each run of a trial, its seeds
  extra: list[list[str]]  # overrides of each additional run
  n_trials: int
  width: int  # number of trials in a batch, sampled before the results of any of them are known
  sampler: str
  seed: int
  objectives: list[str]
  rungs: list[int]  # steps at which trials are pruned
  keep: float  # fraction of the trials that continues after a rung

  def job(self, params: Mapping[str, Any], repeat: int) -> list[str]:
    """The overrides of one run of the trial with these parameters."""
    return [*self.fixed, *(f"{key}={value}" for key, value in params.items()), *self.repeats[repeat]]

  def runs(self, trial: int) -> list[int]:
    """The numbers of the runs of a trial, one for each of its seeds; the extra runs have the first numbers."""
    first = len(self.extra) + trial * len(self.repeats)
    return list(range(first, first + len(self.repeats)))

  def examples(self) -> list[list[str]]:
    """A few jobs that contain every choice and both ends of every interval at least once."""
    columns = {key: parameter.examples() for key, parameter in self.space.items()}
    count = max(len(self.repeats), *map(len, columns.values()))
    jobs = []
    for n in range(count):
      params = {key: _at_most(column, n) for key, column in columns.items()}
      jobs.append(self.job(params, min(n, len(self.repeats) - 1)))
    return [*jobs, *self.extra]

  @property
  def signs(self) -> list[int]:
    """For each objective, 1 if it is minimised and -1 if it is maximised."""
    return [METRICS[name].sign if name in METRICS else 1 for name in self.objectives]

  @property
  def size(self) -> float:
    """The number of distinct trials; infinite if a parameter is continuous."""
    return math.prod(parameter.size for parameter in self.space.values())


def _at_most(column: Sequence[str], n: int) -> str:
  """Element `n` of a column, or its last one."""
  return column[min(n, len(column) - 1)]

"""The plan of a sweep in rounds: the settings to compare, and the value of each that is tuned first. Imports no jax."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lora_exp.report.reading.document_losses import DocumentLosses
from lora_exp.runtime.saved_config import CHANGEABLE

TUNE, SCORE = "tune", "score"  # purposes of a trial: to choose a value, or to compare settings


@dataclass(frozen=True)
class ComparedSetting:
  """One of the settings that a sweep compares."""

  overrides: list[str]  # without seeds
  seeds: list[list[str]]  # overrides of each repetition; [] for a reference, which is trained once and not tuned
  label: str  # the overrides that not all settings share
  compared: bool = True  # whether a verdict on it is wanted; not for the points of `extra`


@dataclass(frozen=True)
class Tuning:
  """How a number such as the learning rate is chosen for each setting."""

  setting: str
  factors: list[float]  # of its default in each setting, ascending
  seed: int  # of the trials that choose, which score nothing
  extend: int  # maximum number of values that are added where the best is the lowest or the highest
  neighbour: bool  # whether the better neighbour of the best value is scored too


@dataclass(frozen=True)
class Decision:
  """When a sweep stops adding seeds; see `lora_exp.sweep.rounds.looks`."""

  looks: list[int]  # seeds of a setting at each look, ascending
  level: float  # probability of a wrong claim, over all looks
  early: float | None = None  # share of the training after which settings may be dropped; None: never


@dataclass(frozen=True)
class Budget:
  """What a sweep may spend. A round that would exceed it is not trained; None: no limit."""

  trials: int | None = None
  steps: int | None = None  # of training, over all trials
  minutes: float | None = None  # of training


@dataclass(frozen=True)
class RoundResult:
  """The results of a trial that decisions use. None in a field means unknown."""

  penalty: float | None = None  # the metric on the tuning half, lower is better; infinity if it diverged
  gain: float | None = None  # improvement over the base on the report half, higher is better; NaN if it diverged
  trainable: int | None = None  # parameters
  steps: int = 0  # trained
  documents: DocumentLosses | None = None  # of the report half, if the metric is the loss
  loss: float | None = None  # of the report half; trials of a setting with identical losses count once
  dropped: bool = False  # whether its setting was dropped during training


Results = Mapping[int, RoundResult]  # by the number of the trial


@dataclass(frozen=True)
class RoundTrial:
  """One trial of a round."""

  number: int
  setting: int  # index in `RoundPlan.settings`
  purpose: str  # TUNE or SCORE
  factor: float | None  # of the default of the tuned setting; None without one
  seed: int  # index in the seeds of the setting; -1 for the seed that tunes
  overrides: list[str]


@dataclass(frozen=True)
class Round:
  """Trials that are launched together."""

  why: str  # one sentence for the console
  trials: list[RoundTrial] = field(default_factory=list)


@dataclass(frozen=True)
class RoundPlan:
  """Everything that defines a sweep in rounds, except for its directory."""

  settings: list[ComparedSetting]
  tuning: Tuning | None
  repeat_failed: bool = False  # whether failed trials are trained again when the sweep is continued
  decision: Decision | None = None  # None: every setting gets every seed
  budget: Budget = Budget()

  @property
  def grid(self) -> list[list[str]]:
    """The jobs without tuning: every setting with the seeds of the first look."""
    return [[*setting.overrides, *seed] for setting in self.settings
            for seed in setting.seeds[: self.seeds_at(0)] or [[]]]

  def seeds_at(self, look: int) -> int | None:
    """The number of seeds of a compared setting at a look; None: all."""
    return None if self.decision is None else self.decision.looks[look]

  @property
  def first_seeds(self) -> int | None:
    """The number of seeds with which a compared setting is scored first; None: all.

    With early dropping and without tuning it is 1: these trials show how well early losses predict the final ones.
    """
    return 1 if self.decision is not None and self.decision.early and self.tuning is None else self.seeds_at(0)

  def fixed(self) -> dict[str, Any]:
    """The settings that must not change when the sweep is continued, as JSON."""
    jobs = [[text for text in job if not _is_changeable(text)] for job in self.grid]
    return {"jobs": jobs, "tune": None if self.tuning is None else asdict(self.tuning),
            "decide": None if self.decision is None else asdict(self.decision)}


def _is_changeable(override: str) -> bool:
  path = override.partition("=")[0].lstrip("+~")
  return any(f"{path}.".startswith(f"{free}.") for free in CHANGEABLE)


def labels(settings: Sequence[Sequence[str]]) -> list[str]:
  """For each list of overrides, a label of those that are not in all lists: 'lora.rank=4'."""
  shared = set.intersection(*map(set, settings)) if len(settings) > 1 else set()
  return [" ".join(text for text in overrides if text not in shared) or "the setting" for overrides in settings]

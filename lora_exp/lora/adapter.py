"""An adapter apart from its model: the rows of its table and its arrays. Files hold it, and the verbs work on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_exp.lora import formula


@dataclass(frozen=True)
class AdaptedModule:
  """One adapted module: a row of the table that every run prints."""

  path: str
  fan_in: int  # I
  fan_out: int  # O
  rank: int  # R
  alpha: float
  scale: float
  parameters: int = 0  # trained ones


@dataclass(frozen=True)
class Adapter:
  """What was trained on a base, and what it started from; no weight of the base itself.

  `leaves[path]` are the arrays of an adapted module by the names of `formula.LEAVES`, at the row's own rank (VeRA's
  shared ones cut to the module's size). `full[path]` are parameters trained in full, by their own dotted path.
  """

  method: str  # of formula.METHODS
  rows: tuple[AdaptedModule, ...]
  leaves: Mapping[str, Mapping[str, Any]]
  full: Mapping[str, Any] = field(default_factory=dict)

  @property
  def started(self) -> bool:
    """Whether it began as part of the base's kernels (PiSSA, OLoRA), which is taken off again."""
    return any("start_a" in own for own in self.leaves.values())

  def update_IO(self, path: str) -> np.ndarray:
    """ΔW (I, O) of one module in its arrays' dtype, without DoRA's factor."""
    row = next(row for row in self.rows if row.path == path)
    return np.asarray(formula.update(self.leaves[path], row.scale))

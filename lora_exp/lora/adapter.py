"""An adapter apart from its model: the rows of its table and its arrays. Files hold it, and the verbs work on it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods import Method


@dataclass(frozen=True)
class Adapter:
  """What was trained on a base, and what it started from; no weight of the base itself.

  `leaves[path]` are the arrays of an adapted module by the names of its method's leaves, at the row's own rank (shared
  ones cut to the module's size). `full[path]` are parameters trained in full, by their own dotted path.
  """

  method: str  # a name of lora.methods
  rows: tuple[AdaptedModule, ...]
  leaves: Mapping[str, Mapping[str, Any]]
  full: Mapping[str, Any] = field(default_factory=dict)

  @property
  def kind(self) -> Method:
    """The method itself."""
    return methods.get(self.method)

  def update_IO(self, path: str, kernel: Any = None) -> np.ndarray:
    """ΔW (I, O) of one module in its arrays' dtype, without DoRA's factor.

    `kernel`: W (…, I, O), for a method whose ΔW depends on it.
    """
    row = next(row for row in self.rows if row.path == path)
    return np.asarray(self.kind.delta(kernel, self.leaves[path], row.scale))

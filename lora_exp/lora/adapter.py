"""An adapter without its model: the table of adapted modules and their arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods import Method


@dataclass(frozen=True)
class Adapter:
  """The trained arrays of an adapter and the constants of its method, without any weight of the base.

  `leaves[path]` holds the arrays of one adapted module by leaf name, at the rank of its row; leaves that modules share
  are cut to the module's size. `full[path]` holds parameters that were trained in full, by dotted path.
  """

  method: str  # the name of the method, as in `lora.method`
  rows: tuple[AdaptedModule, ...]
  leaves: Mapping[str, Mapping[str, Any]]
  full: Mapping[str, Any] = field(default_factory=dict)

  @property
  def kind(self) -> Method:
    """The method as an object."""
    return methods.get(self.method)

  def update_IO(self, path: str, kernel: Any = None) -> np.ndarray:
    """Returns ΔW (…, I, O) of one module before any gate (DoRA's), in the dtype of its arrays.

    `kernel` is W (…, I, O), for methods whose ΔW depends on it.
    """
    row = next(row for row in self.rows if row.path == path)
    return np.asarray(self.kind.delta(kernel, self.leaves[path], row.scale))

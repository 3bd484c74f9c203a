"""An adapter without its model: the table of adapted modules and their arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_exp.lora import methods
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.methods import Method


@dataclass(frozen=True)
class BaseChanges:
  """How the base that an adapter was trained on differs from the given model. None of these values is trained."""

  parameters: Mapping[str, Any] = field(default_factory=dict)  # new values, by dotted path
  token_rows: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)  # (token ids, new rows), by path of the table
  biases: Mapping[str, Any] = field(default_factory=dict)  # (O,) added to the outputs of the module at a path
  vocab_size: int | None = None  # the size of a vocabulary that is larger than that of the given model
  untied: bool = False  # whether the head has its own kernel, although the given model ties it to the embeddings

  def __bool__(self) -> bool:
    """Whether anything differs."""
    return bool(self.parameters or self.token_rows or self.biases or self.vocab_size or self.untied)

  def apply(self, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `arrays`, the parameters of the base by dotted path, with the changed values in their dtypes."""
    changed = dict(arrays)
    for path, x in self.parameters.items():
      changed[path] = jnp.asarray(x, changed[path].dtype)
    for path, (ids, rows) in self.token_rows.items():
      name = f"{path}.embedding"
      table = jnp.asarray(changed[name])
      changed[name] = table.at[jnp.asarray(ids)].set(jnp.asarray(rows, table.dtype))
    for path, x in self.biases.items():
      bias = changed[f"{path}.bias"]
      changed[f"{path}.bias"] = bias + jnp.asarray(x, bias.dtype)
    return changed

  def paths(self) -> list[str]:
    """The paths of the parameters that `apply` changes."""
    rows = [f"{path}.embedding" for path in self.token_rows]
    return [*self.parameters, *rows, *(f"{path}.bias" for path in self.biases)]


@dataclass(frozen=True)
class Adapter:
  """The trained arrays of an adapter and the constants of its method, without any weight of the base.

  `leaves[path]` holds the arrays of one adapted module by leaf name, at the rank of its row; leaves that modules share
  are cut to the module's size. `full[path]` holds parameters that were trained in full, by dotted path. `base` holds
  the changes of the base that the adapter was trained on.
  """

  method: str  # the name of the method, as in `lora.method`
  rows: tuple[AdaptedModule, ...]
  leaves: Mapping[str, Mapping[str, Any]]
  full: Mapping[str, Any] = field(default_factory=dict)
  base: BaseChanges = field(default_factory=BaseChanges)

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

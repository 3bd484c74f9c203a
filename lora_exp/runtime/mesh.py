"""The device mesh, and how each array is sharded over it.

The dotted path of a parameter determines the logical axes of its array, so models need no annotations; `axis_rules.py`
has the rules.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_exp.config import MeshConfig
from lora_exp.runtime.axis_rules import BATCH, AxisRules, mesh_sizes
from lora_exp.runtime.host_arrays import put_equal


def make_mesh(cfg: MeshConfig) -> Mesh:
  """Creates the mesh of `cfg` over all devices. Raises InputError if the sizes do not match the number of devices."""
  sizes = mesh_sizes(cfg, jax.device_count())
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def dotted(key_path: Sequence[Any]) -> str:
  """The dotted path of a JAX key path, from its dictionary keys only, so an optimizer leaf has its parameter's path."""
  return ".".join(str(k.key) for k in key_path if isinstance(k, jax.tree_util.DictKey))


def flatten(tree: Any) -> dict[str, jax.Array]:
  """The leaves of nested dicts by dotted path, in path order."""
  return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass(frozen=True)
class Layout:
  """How arrays are sharded over a mesh. `axes` and `units` come from the model's family (models/family.py)."""

  mesh: Mesh
  axes: Mapping[str, Sequence[str | None]] = field(default_factory=dict)  # end of a path -> logical axes of its array
  units: Mapping[str, int] = field(default_factory=dict)  # logical axis -> number of pieces such as heads
  leaves: Mapping[str, str] = field(default_factory=dict)  # factor of an adapter -> its axes, letters of I, O and R

  def spec(self, path: str, shape: Sequence[int], *, trials: bool = False, gathered: bool = False) -> P:
    """The PartitionSpec of the array at `path`.

    With `trials` it has a leading axis of trials; with `gathered` it is not split over fsdp.
    """
    body = tuple(shape[1:]) if trials else tuple(shape)
    axes = [axis for axis, _ in self.rules.split(path, body, gathered)]
    if not trials:
      return P(*axes)
    ways = self.mesh.shape["trial"]
    return P("trial" if ways > 1 and shape[0] % ways == 0 else None, *axes)

  @property
  def rules(self) -> AxisRules:
    """The rules by which array axes are split over the mesh."""
    return AxisRules(self.mesh.shape, self.axes, self.units, self.leaves)

  def shardings(self, tree: Any, *, trials: bool = False) -> Any:
    """A NamedSharding for each leaf of nested dicts, or of an optimizer's state over them."""

    def sharding(key_path: Sequence[Any], x: Any) -> NamedSharding:
      return NamedSharding(self.mesh, self.spec(dotted(key_path), x.shape, trials=trials and x.ndim > 0))

    return jax.tree_util.tree_map_with_path(sharding, tree)

  def gather_fsdp(self, tree: Any) -> Any:
    """Inside jit, gathers the parameters over `fsdp`, so that weights are communicated instead of activations."""
    if self.mesh.shape["fsdp"] == 1:
      return tree

    def gathered(key_path: Sequence[Any], x: jax.Array) -> jax.Array:
      spec = self.spec(dotted(key_path), x.shape, gathered=True)
      return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    return jax.tree_util.tree_map_with_path(gathered, tree)

  @property
  def replicated(self) -> NamedSharding:
    """The sharding of a replicated array."""
    return NamedSharding(self.mesh, P())

  @property
  def batch(self) -> NamedSharding:
    """The sharding of a batch: rows split over `data` and `fsdp`."""
    return NamedSharding(self.mesh, P(BATCH))

  @property
  def order_batch(self) -> NamedSharding:
    """The sharding of a batch with a leading axis of orders of the rows, which is not split."""
    return NamedSharding(self.mesh, P(None, BATCH))

  @property
  def batch_ways(self) -> int:
    """The number of pieces that a batch is split into."""
    return math.prod(self.mesh.shape[axis] for axis in BATCH)

  @cached_property
  def several_processes(self) -> bool:
    """Whether the devices of the mesh belong to several processes."""
    return len({device.process_index for device in self.mesh.devices.flat}) > 1

  @property
  def local(self) -> "Layout":
    """The layout for the first device of this process alone."""
    sizes = (1,) * len(self.mesh.axis_names)
    devices = np.array(jax.local_devices()[:1]).reshape(sizes)
    return replace(self, mesh=Mesh(devices, self.mesh.axis_names, axis_types=(AxisType.Auto,) * len(sizes)))

  def process_rows(self, batch_size: int) -> list[int]:
    """The rows of a batch that the devices of this process hold."""
    return sorted(self._rows_of(batch_size, jax.process_index()))

  def owned_rows(self, batch_size: int) -> list[int]:
    """The part of `process_rows` that no earlier process has: every row belongs to one process."""
    earlier = [self._rows_of(batch_size, process) for process in range(jax.process_index())]
    return [row for row in self.process_rows(batch_size) if not any(row in rows for rows in earlier)]

  def _rows_of(self, batch_size: int, process: int) -> set[int]:
    indices: Mapping[Any, Any] = self.batch.devices_indices_map((batch_size,))
    slices = [index[0] for device, index in indices.items() if device.process_index == process]
    return {row for part in slices for row in range(batch_size)[part]}

  def put_rows(self, batch: Mapping[str, np.ndarray], batch_size: int, orders: bool = False) -> dict[str, jax.Array]:
    """Like `put_batch`, but each process passes only its `process_rows`, which together form the batch."""
    sharding = self.order_batch if orders else self.batch

    def put(x: np.ndarray) -> jax.Array:
      shape = (x.shape[0], batch_size, *x.shape[2:]) if orders else (batch_size, *x.shape[1:])
      return jax.make_array_from_process_local_data(sharding, x, shape)

    return {name: put(x) for name, x in batch.items()}

  def put_batch(self, batch: Mapping[str, np.ndarray], orders: bool = False) -> dict[str, jax.Array]:
    """Transfers `batch` to the devices. `orders`: its arrays have a leading axis of orders of the rows."""
    return put_equal(dict(batch), self.order_batch if orders else self.batch)

  def table(self, tree: Any) -> list[tuple[str, str, str, str]]:
    """Rows (path, shape, split, note) for the sharding table; equal blocks of a model share a row."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    for path, x in flatten(tree).items():
      kind = ".".join("*" if segment.isdigit() else segment for segment in path.split("."))
      if kind in rows:
        continue
      axes = self.rules.split(path, x.shape)
      split = " × ".join(f"{axis} {self.mesh.shape[axis]}" if axis else "whole" for axis, _ in axes) or "whole"
      notes = [note for _, note in axes if note]
      rows[kind] = (kind, "×".join(map(str, x.shape)), split, notes[-1] if notes else "")
    return list(rows.values())

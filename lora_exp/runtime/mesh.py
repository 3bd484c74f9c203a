"""The device mesh, and how each array is sharded over it.

The dotted path of a parameter determines the logical axes of its array, so models need no annotations. `LOGICAL` maps
logical axes to mesh axes. An array axis that the mesh axis does not divide is replicated, which the sharding table
shows; only the batch must divide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_exp.config import InputError, MeshConfig

LOGICAL = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
BATCH = ("data", "fsdp")


def make_mesh(cfg: MeshConfig) -> Mesh:
  """Creates the mesh of `cfg` over all devices. Raises InputError if the sizes do not match the number of devices."""
  sizes = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
  devices, fixed = jax.device_count(), math.prod(n for n in sizes.values() if n != -1)
  wanted = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items() if v != 1)
  if devices % fixed or (-1 not in sizes.values() and fixed != devices):
    raise InputError(
      f"{wanted} needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices and there are {devices}; "
      "change the sizes (-1 takes the remaining devices), or on a CPU set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={fixed}"
    )
  sizes = {k: devices // fixed if v == -1 else v for k, v in sizes.items()}
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
    axes = [axis for axis, _ in self._split(path, body, gathered)]
    if not trials:
      return P(*axes)
    ways = self.mesh.shape["trial"]
    return P("trial" if ways > 1 and shape[0] % ways == 0 else None, *axes)

  def _split(self, path: str, shape: Sequence[int], gathered: bool) -> list[tuple[str | None, str]]:
    """(mesh axis or None, reason for not splitting or '') for each axis of the array at `path`."""
    logical = self._logical_axes(path, len(shape))
    return [self._mesh_axis(axis, size, gathered) for axis, size in zip(logical, shape, strict=True)]

  def _logical_axes(self, path: str, rank: int) -> Sequence[str | None]:
    path = path.replace(".frozen_", ".")  # the base's value of a parameter that is trained in full
    owner, _, leaf = path.rpartition(".")
    for name, axes in self.axes.items():
      module = name.rsplit(".", 1)[0]
      letters = self.leaves.get(leaf)
      # The factors of a stack of kernels (three axes) have its first axis too.
      if letters is not None and rank == len(axes) - 2 + len(letters) and owner.endswith(module):
        kernel_axes = dict(zip("IO", axes[-2:], strict=True))
        factor_axes = [*axes[:-2], *(kernel_axes.get(letter) for letter in letters)]
        return [axis if axis != "embed" else None for axis in factor_axes]
      if path.endswith(name) and len(axes) == rank:
        return axes
    return (None,) * rank

  def _mesh_axis(self, logical: str | None, size: int, gathered: bool) -> tuple[str | None, str]:
    axis = LOGICAL.get(logical or "")
    ways = self.mesh.shape[axis] if axis else 1
    if ways == 1 or (gathered and axis == "fsdp"):
      return None, ""
    pieces = self.units.get(logical or "", size)
    if size % ways:  # for example the scales of a quantised kernel, which has fewer scales than inputs
      pieces = size
    if pieces % ways:
      return None, f"{logical} {pieces:,} does not divide over {axis} {ways}: replicated"
    return axis, ""

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

  def put_batch(self, batch: Mapping[str, np.ndarray], orders: bool = False) -> dict[str, jax.Array]:
    """Transfers `batch` to the devices. `orders`: its arrays have a leading axis of orders of the rows."""
    return jax.device_put(dict(batch), self.order_batch if orders else self.batch)

  def table(self, tree: Any) -> list[tuple[str, str, str, str]]:
    """Rows (path, shape, split, note) for the sharding table; equal blocks of a model share a row."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    for path, x in flatten(tree).items():
      kind = ".".join("*" if segment.isdigit() else segment for segment in path.split("."))
      if kind in rows:
        continue
      axes = self._split(path, x.shape, gathered=False)
      split = " × ".join(f"{axis} {self.mesh.shape[axis]}" if axis else "whole" for axis, _ in axes) or "whole"
      notes = [note for _, note in axes if note]
      rows[kind] = (kind, "×".join(map(str, x.shape)), split, notes[-1] if notes else "")
    return list(rows.values())

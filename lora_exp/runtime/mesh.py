"""The device mesh, which logical axis of an array lies on which mesh axis, and a table that explains the sharding.

Rules go by a parameter's dotted path, so they need no annotations and work on any model. An axis that a mesh axis
does not divide is replicated, and the table says so; only the batch must divide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_exp.config import InputError, MeshConfig

LOGICAL = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
BATCH = ("data", "fsdp")


def keep_programs(cache: str) -> None:
  """Turns JAX's persistent compilation cache on, in the cache directory and for every program however small."""
  jax.config.update("jax_compilation_cache_dir", str(Path(cache).expanduser() / "programs"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def make_mesh(cfg: MeshConfig) -> Mesh:
  """The mesh of `cfg` over the devices there are; raises InputError where the sizes do not fit them."""
  sizes = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
  devices, fixed = jax.device_count(), math.prod(n for n in sizes.values() if n != -1)
  wanted = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items() if v != 1)
  if devices % fixed or (-1 not in sizes.values() and fixed != devices):
    raise InputError(
      f"{wanted} needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices and there are {devices}; "
      "change the sizes (-1 takes what the others leave), or on a CPU set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={fixed}"
    )
  sizes = {k: devices // fixed if v == -1 else v for k, v in sizes.items()}
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def dotted(key_path: Sequence) -> str:
  """The dotted path of a JAX key path, of dictionary keys alone: an optimizer's leaf has its parameter's."""
  return ".".join(str(k.key) for k in key_path if isinstance(k, jax.tree_util.DictKey))


def flatten(tree) -> dict[str, jax.Array]:
  """Leaves of nested dicts by dotted path, in path order."""
  return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@dataclass
class Layout:
  """Where every array lies. `axes` and `units` come from the model's family (models/family.py)."""

  mesh: Mesh
  axes: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
  units: Mapping[str, int] = field(default_factory=dict)
  leaves: Mapping[str, str] = field(default_factory=dict)  # adapter's factor -> its axes, of I (in), O (out) and R (rank)
  notes: dict[str, str] = field(default_factory=dict)  # path -> why an axis was replicated

  def spec(self, path: str, shape: Sequence[int], *, trials: bool = False, gathered: bool = False) -> P:
    """The partition of the array at `path`; `trials`: it has a leading axis of trials; `gathered`: not split over fsdp."""
    body = tuple(shape[1:]) if trials else tuple(shape)
    names = self._logical(path, len(body))
    split = [self._mesh_axis(path, name, size, gathered) for name, size in zip(names, body, strict=True)]
    ways = self.mesh.shape["trial"]
    return P("trial" if ways > 1 and shape[0] % ways == 0 else None, *split) if trials else P(*split)

  def _logical(self, path: str, rank: int) -> Sequence[str | None]:
    path = path.replace(".frozen_", ".")  # the base's own value of a parameter that is trained in full
    owner, _, leaf = path.rpartition(".")
    for name, axes in self.axes.items():
      module = name.rsplit(".", 1)[0]
      if leaf in self.leaves and len(axes) == 2 and owner.endswith(module):
        kernel_axes = dict(zip("IO", axes, strict=True))
        split = [kernel_axes.get(axis) for axis in self.leaves[leaf]]
        return [axis if axis != "embed" else None for axis in split]
      if path.endswith(name) and len(axes) == rank:
        return axes
    return (None,) * rank

  def _mesh_axis(self, path: str, logical: str | None, size: int, gathered: bool) -> str | None:
    axis = LOGICAL.get(logical or "")
    ways = self.mesh.shape[axis] if axis else 1
    if ways == 1 or (gathered and axis == "fsdp"):
      return None
    pieces = self.units.get(logical or "", size)
    if size % ways:  # as of a quantised kernel's scales, which are fewer than its inputs
      pieces = size
    if pieces % ways:
      self.notes[path] = f"{logical} {pieces:,} does not divide over {axis} {ways}: replicated"
      return None
    return axis

  def shardings(self, tree, *, trials: bool = False):
    """A NamedSharding for each leaf of nested dicts (or of an optimizer's state over them)."""
    place = lambda path, x: NamedSharding(self.mesh, self.spec(dotted(path), x.shape, trials=trials and x.ndim > 0))
    return jax.tree_util.tree_map_with_path(place, tree)

  def gather_fsdp(self, tree):
    """Inside jit: the parameters whole over `fsdp`, so that weights travel and activations do not."""
    if self.mesh.shape["fsdp"] == 1:
      return tree
    whole = lambda path, x: jax.lax.with_sharding_constraint(
      x, NamedSharding(self.mesh, self.spec(dotted(path), x.shape, gathered=True))
    )
    return jax.tree_util.tree_map_with_path(whole, tree)

  @property
  def replicated(self) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(self.mesh, P())

  @property
  def batch(self) -> NamedSharding:
    """Rows split over `data` and `fsdp`."""
    return NamedSharding(self.mesh, P(BATCH))

  @property
  def batch_ways(self) -> int:
    """Pieces that a batch is split into."""
    return math.prod(self.mesh.shape[a] for a in BATCH)

  def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the devices."""
    return jax.device_put(dict(batch), self.batch)

  def table(self, tree) -> list[tuple[str, str, str, str]]:
    """Rows (path, shape, how it is split, note), layers of a kind folded into one row."""
    rows: dict[str, tuple[str, str, str, str]] = {}
    for path, x in flatten(tree).items():
      kind = ".".join("*" if s.isdigit() else s for s in path.split("."))
      spec = self.spec(path, x.shape)
      split = " × ".join(f"{a} {self.mesh.shape[a]}" if a else "whole" for a in spec) or "whole"
      rows.setdefault(kind, (kind, "×".join(map(str, x.shape)), split, self.notes.get(path, "")))
    return list(rows.values())

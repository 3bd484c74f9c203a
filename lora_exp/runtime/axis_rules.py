"""The rules by which the axes of arrays are split over a device mesh, from the sizes of the mesh alone. No jax.

The dotted path of a parameter determines the logical axes of its array. `LOGICAL` maps logical axes to mesh axes. An
array axis that the mesh axis does not divide is replicated, which the sharding table shows; only the batch must divide.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from lora_exp.config import InputError, MeshConfig

LOGICAL = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "fsdp"}
BATCH = ("data", "fsdp")


def mesh_sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
  """The size of each mesh axis over `devices` devices. Raises InputError if the sizes of `cfg` do not match them."""
  sizes = {f.name: getattr(cfg, f.name) for f in fields(cfg)}
  fixed = math.prod(n for n in sizes.values() if n != -1)
  wanted = ", ".join(f"mesh.{k}={v}" for k, v in sizes.items() if v != 1)
  if devices % fixed or (-1 not in sizes.values() and fixed != devices):
    raise InputError(
      f"{wanted} needs {'a multiple of ' if -1 in sizes.values() else ''}{fixed} devices, but there are {devices}; "
      "change the sizes (-1 takes the remaining devices), or on a CPU set "
      f"XLA_FLAGS=--xla_force_host_platform_device_count={fixed}"
    )
  return {k: devices // fixed if v == -1 else v for k, v in sizes.items()}


@dataclass(frozen=True)
class AxisRules:
  """How arrays are split over a mesh with `sizes`. `axes` and `units` come from the model's family."""

  sizes: Mapping[str, int]  # mesh axis -> devices along it
  axes: Mapping[str, Sequence[str | None]] = field(default_factory=dict)  # end of a path -> logical axes of its array
  units: Mapping[str, int] = field(default_factory=dict)  # logical axis -> number of pieces such as heads
  leaves: Mapping[str, str] = field(default_factory=dict)  # factor of an adapter -> its axes, letters of I, O and R

  def split(self, path: str, shape: Sequence[int], gathered: bool = False) -> list[tuple[str | None, str]]:
    """(mesh axis or None, reason for not splitting it or '') for each axis of the array at `path`.

    With `gathered` it is not split over fsdp.
    """
    logical = self.logical_axes(path, len(shape))
    return [self._mesh_axis(axis, size, gathered) for axis, size in zip(logical, shape, strict=True)]

  def local_size(self, path: str, shape: Sequence[int], gathered: bool = False) -> int:
    """The number of elements of the array at `path` on one device."""
    ways = [self.sizes[axis] if axis else 1 for axis, _ in self.split(path, shape, gathered)]
    return math.prod(shape) // math.prod(ways)

  def logical_axes(self, path: str, rank: int) -> Sequence[str | None]:
    """The logical axes, such as embed and vocab, of the array at `path` with `rank` axes; None for unnamed ones."""
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
    ways = self.sizes[axis] if axis else 1
    if ways == 1 or (gathered and axis == "fsdp"):
      return None, ""
    pieces = self.units.get(logical or "", size)
    if size % ways:  # for example the scales of a quantised kernel, which has fewer scales than inputs
      pieces = size
    if pieces % ways:
      return None, f"{logical} {pieces:,} does not divide over {axis} {ways}: replicated"
    return axis, ""

"""The numbers that the processes of a run exchange at every step: counts of their rows, and whether one is to stop.

A small separate program sends them with the step. They are read one step later, so that no process waits for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lora_exp.runtime.mesh import Layout


@dataclass(frozen=True)
class Exchange:
  """The numbers of all processes at one step, which may not have arrived yet."""

  names: tuple[str, ...]  # of the counts of each order of rows
  numbers: Any  # float64 (processes, 1 + orders * names), or the same as int32 on the devices

  @property
  def stops(self) -> bool:
    """Whether any process is to stop."""
    return bool(self._values()[:, 0].any())

  def counts(self) -> list[dict[str, float]]:
    """The counts of each order of rows, over all processes."""
    totals = self._values()[:, 1:].sum(axis=0)
    names = len(self.names)
    return [dict(zip(self.names, totals[k : k + names].tolist(), strict=True)) for k in range(0, len(totals), names)]

  def _values(self) -> np.ndarray:
    if isinstance(self.numbers, np.ndarray):
      return self.numbers
    rows = np.asarray(self.numbers)[_first_devices()]
    return np.ascontiguousarray(rows).view(np.float64)


def exchange(layout: Layout, stops: bool, counts: Sequence[dict[str, float]]) -> Exchange:
  """Sends whether this process is to stop, and the counts of its rows by order. All processes must call it."""
  names = tuple(counts[0]) if counts else ()
  values = np.array([[float(stops), *(part[name] for part in counts for name in names)]])
  if not layout.several_processes:
    return Exchange(names, values)
  sharding, gather = _gather()
  bits = np.repeat(values.view(np.int32), jax.local_device_count(), axis=0)  # float64 is not enabled on the devices
  shape = (jax.device_count(), bits.shape[1])
  return Exchange(names, gather(jax.make_array_from_process_local_data(sharding, bits, shape)))


def any_process(layout: Layout, value: bool) -> bool:
  """Whether `value` holds on any process of the mesh. All processes must call it, and they wait for each other."""
  return exchange(layout, value, []).stops


@cache
def _gather() -> tuple[NamedSharding, Any]:
  """The sharding of one row for each device, and the program that gives all rows to every device."""
  mesh = Mesh(np.array(jax.devices()), ("device",), axis_types=(AxisType.Auto,))
  return NamedSharding(mesh, P("device")), jax.jit(_same, out_shardings=NamedSharding(mesh, P()))


def _same(x: jax.Array) -> jax.Array:
  return x


@cache
def _first_devices() -> list[int]:
  """The index in jax.devices() of the first device of each process."""
  processes = [device.process_index for device in jax.devices()]
  return [processes.index(process) for process in range(jax.process_count())]

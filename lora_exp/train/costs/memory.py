"""The memory of a pack: the available bytes, an estimate of what its step needs, and out-of-memory errors.

The estimate is a formula, so that a sweep can size its packs before compiling anything. The memory of the compiled
step, as XLA reports it, is then compared with the available memory, and a pack that is too large is split.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from lora_exp.config import InputError, MemoryFullError
from lora_exp.lora import methods
from lora_exp.train.compiled_step import CompiledStep
from lora_exp.train.costs.step_memory import StepMemory, step_memory
from lora_exp.train.costs.workload import Workload
from lora_exp.train.job import mapping_of
from lora_exp.train.plan import Plan

HOST, ACCELERATOR = 0.8, 0.95  # usable fractions of the memory; a process needs more than the arrays of its step
CERTAIN = 0.8  # of the estimated temporaries: a run is refused only if it cannot fit
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryEstimate:
  """The bytes that a step needs on one device."""

  solo: int  # for one trial: base, adapter, optimizer state and temporaries
  further: int  # for each further trial on the device
  ways: int = 1  # size of the mesh axis `trial`, which splits the trials

  def of(self, trials: int) -> int:
    """The bytes that a pack of `trials` trials needs."""
    return self.solo + (math.ceil(trials / self.ways) - 1) * self.further

  def most(self, memory: int) -> int:
    """The largest number of trials whose step fits in `memory` bytes; 0 if one does not fit."""
    return 0 if memory < self.solo else self.ways * (1 + (memory - self.solo) // max(1, self.further))

  def at_least(self, other: "MemoryEstimate") -> "MemoryEstimate":
    """The larger value of both estimates, field by field."""
    return MemoryEstimate(max(self.solo, other.solo), max(self.further, other.further), self.ways)


def workload_of(plan: Plan) -> Workload:
  """The workload of a plan, from its own shapes and mesh."""
  shapes = {path: tuple(x.shape) for path, x in plan.shapes.items()}
  method = methods.of(plan.cfg.lora)
  return Workload(plan.cfg, shapes, plan.table, plan.full, method, plan.vocab_size, plan.layout.rules)


def estimate(plan: Plan) -> MemoryEstimate:
  """Estimates the memory of a step whose trials equal `plan`, as task=plan does.

  A loop over trials holds the state of all trials twice, as its input and its output, and the temporaries of one. Under
  vmap, each trial has temporaries.
  """
  memory = _step_memory(plan)
  further = 2 * memory.state + (memory.work if mapping_of(plan.layout) == "vmap" else 0)
  return MemoryEstimate(memory.total, further, plan.layout.mesh.shape["trial"])


def _step_memory(plan: Plan) -> StepMemory:
  return step_memory(workload_of(plan), jax.default_backend())


def require_memory(plan: Plan, trains: bool = True) -> None:
  """Raises InputError if a run of `plan` cannot fit in the memory of its devices; allocates nothing.

  The estimate of temporaries may be too large, so only a part of it counts. Without `trains`, only the base counts.
  """
  memory, available, cfg = _step_memory(plan), _device_bytes(), plan.cfg
  state, work = (memory.state, memory.work) if trains else (0, 0)
  if memory.base + state + CERTAIN * work <= available:
    return
  kinds = {
    "the base": (memory.base, f"a smaller model (model.width={cfg.model.width}, model.layers={cfg.model.layers}), "
                              "model.param_dtype=bfloat16, or mesh.fsdp over more devices"),
    "the trained parameters with their optimizer state": (state, f"lora.rank={cfg.lora.rank} or the number of targets"),
    "a step": (work, f"train.batch_size={cfg.train.batch_size} or data.seq_len={cfg.data.seq_len}"),
  }  # fmt: skip
  largest = max(kinds, key=lambda kind: kinds[kind][0])
  size, advised = kinds[largest]
  advised = f"use {advised}" if largest == "the base" else f"lower {advised}"
  raise InputError(f"the run needs about {nbytes(memory.base + state + work)} of memory on each device, of which "
                   f"{largest} takes {nbytes(size)}, but {nbytes(available)} is available; {advised}; task=plan shows "
                   "the memory by kind")


def widest(plans: Sequence[Plan]) -> MemoryEstimate:
  """The memory estimate for packs of `plans`: the largest estimate of any trial, field by field."""
  need = estimate(plans[0])
  for plan in plans[1:]:
    need = need.at_least(estimate(plan))
  return need


def device_memory() -> int:
  """The bytes available on one device: as the accelerator reports, or a fraction of the host's memory."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return int(ACCELERATOR * stats["bytes_limit"]) - stats.get("bytes_in_use", 0)
  return int(HOST * _device_bytes())


def _device_bytes() -> int:
  """The bytes that are free on one device."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "bytes_limit" in stats:
    return int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
  return int(min(_available(), _allowed())) // jax.local_device_count()


def _available() -> int:
  """The available bytes of host memory; file caches count as free."""
  try:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
  except (OSError, StopIteration):  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _allowed() -> float:
  """The bytes that the container may still allocate (cgroup v2); infinity without a limit."""
  try:
    limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines()).get("inactive_file", 0)
    return math.inf if limit == "max" else max(0, int(limit) - int(used) + int(cached))
  except (OSError, ValueError):
    return math.inf


def check_fits(step: CompiledStep) -> None:
  """Raises MemoryFullError if the compiled step of several trials needs more memory than is available."""
  needed, available = step.working_bytes, device_memory()
  if needed > available:
    raise MemoryFullError(f"the step needs {nbytes(needed)} of working memory, but {nbytes(available)} is available")


@contextmanager
def memory_errors(plan: Plan, trials: int = 1) -> Iterator[None]:
  """Converts out-of-memory errors of JAX and Python to MemoryFullError, with advice for a single trial."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    reason = (str(error).splitlines() or ["out of memory"])[0].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(".")
    advised = f"the step does not fit in memory ({reason}): {advice(plan)}"
    raise MemoryFullError(reason if trials > 1 else advised) from None


def advice(plan: Plan) -> str:
  """Settings that reduce the memory of a trial."""
  cfg = plan.cfg
  return (
    f"split the batch into microbatches (optim.accumulate={2 * cfg.optim.accumulate}), lower train.batch_size="
    f"{cfg.train.batch_size} or data.seq_len={cfg.data.seq_len}, set model.remat=true, or shard the base over more "
    "devices (mesh.fsdp); task=plan shows the memory of a step"
  )


def nbytes(count: float) -> str:
  """A number of bytes with a binary unit, such as 4.07 MiB."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if abs(count) < 1024:
      return f"{count:.4g} {unit}"
    count /= 1024
  return f"{count:.4g} TiB"

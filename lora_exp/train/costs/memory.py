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
from jax.sharding import NamedSharding

from lora_exp.config import InputError, MemoryFullError
from lora_exp.data.sources import is_numeric
from lora_exp.lora import methods
from lora_exp.train.compiled_step import CompiledStep
from lora_exp.train.compute.loss import CHUNK_LOGITS
from lora_exp.train.job import mapping_of
from lora_exp.train.plan import Plan

HOST, ACCELERATOR = 0.8, 0.95  # usable fractions of the memory; a process needs more than the arrays of its step
WORKING = 1.25  # measured ratio of XLA's temporaries to the kernels' inputs and outputs and attention weights
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


def estimate(plan: Plan) -> MemoryEstimate:
  """Estimates the memory of a step whose trials equal `plan`, within a factor of two of XLA's analysis for one trial.

  A loop over trials holds the state of all trials twice, as its input and its output, and the temporaries of one. Under
  vmap, each trial has temporaries.
  """
  base, state, work = _parts(plan)
  further = 2 * state + (work if mapping_of(plan.layout) == "vmap" else 0)
  return MemoryEstimate(base + state + work, further, plan.layout.mesh.shape["trial"])


def _parts(plan: Plan) -> tuple[int, int, int]:
  """(base, state, work) of one trial, in bytes on one device: `work` is the gradient and the temporaries."""
  cfg, trained = plan.cfg, 4 * int(plan.parameters()["trainable"])
  moments = (cfg.optim.momentum > 0) if cfg.optim.name == "sgd" else 2
  base = sum(_local(plan, path, x) for path, x in plan.shapes.items())
  return base, trained * (1 + moments), trained + _working(plan)


def require_memory(plan: Plan, trains: bool = True) -> None:
  """Raises InputError if a run of `plan` cannot fit in the memory of its devices; allocates nothing.

  The estimate of temporaries may be twice too large, so only half of it counts. Without `trains`, only the base counts.
  """
  base, state, work = _parts(plan)
  if not trains:
    state = work = 0
  if methods.of(plan.cfg.lora).trains_everything:
    base = 0  # the trained parameters are those of the base
  available = _device_bytes()
  if base + state + work // 2 <= available:
    return
  cfg = plan.cfg
  kinds = {
    "the base": (base, f"a smaller model (model.width={cfg.model.width}, model.layers={cfg.model.layers}), "
                       "model.param_dtype=bfloat16, or mesh.fsdp over more devices"),
    "the trained parameters with their optimizer state": (state, f"lora.rank={cfg.lora.rank} or the number of targets"),
    "a step": (work, f"train.batch_size={cfg.train.batch_size} or data.seq_len={cfg.data.seq_len}"),
  }  # fmt: skip
  largest = max(kinds, key=lambda kind: kinds[kind][0])
  size, advised = kinds[largest]
  advised = f"use {advised}" if largest == "the base" else f"lower {advised}"
  raise InputError(f"the run needs about {nbytes(base + state + work)} of memory on each device, of which {largest} "
                   f"takes {nbytes(size)}, and {nbytes(available)} are available; {advised}")


def _local(plan: Plan, path: str, x) -> int:
  """The bytes of an array of the base on one device."""
  sharding = NamedSharding(plan.layout.mesh, plan.layout.spec(path, x.shape))
  return math.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize


def _working(plan: Plan) -> int:
  """The bytes of temporaries of a gradient on one device.

  Counts the inputs and outputs of all kernels and twice the attention weights for every token, and a chunk of logits.
  """
  cfg = plan.cfg
  rows = max(1, cfg.train.batch_size // (plan.layout.batch_ways * cfg.optim.accumulate))
  length = 1 if is_numeric(cfg.data) else cfg.data.seq_len
  kernels = [x.shape for path, x in plan.shapes.items() if path.endswith("kernel")]
  wide = sum(shape[-2] + shape[-1] for shape in kernels if len(shape) > 1 and plan.vocab_size not in shape)
  attention = 0 if is_numeric(cfg.data) else 2 * cfg.model.layers * cfg.model.heads * length
  if cfg.model.remat:
    wide, attention = wide // cfg.model.layers, attention // cfg.model.layers
  each = (wide + attention) * (2 if cfg.model.dtype == "bfloat16" else 4)
  logits = 0 if is_numeric(cfg.data) else min(CHUNK_LOGITS, rows * length * plan.vocab_size)
  return int(WORKING * rows * length * each + 1.5 * 4 * logits)


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
    raise MemoryFullError(f"the step needs {nbytes(needed)} of working memory; {nbytes(available)} are available")


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

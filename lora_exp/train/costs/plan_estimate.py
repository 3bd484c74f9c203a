"""The estimate of `task=plan`: memory, operations, communication, time, and what fits, from shapes alone. No jax."""

import math
from dataclasses import dataclass

from lora_exp.train.costs.collectives import Collective, collectives_of, sent_bytes
from lora_exp.train.costs.device_kinds import DeviceKind
from lora_exp.train.costs.step_flops import StepFlops, step_flops
from lora_exp.train.costs.step_memory import StepMemory, step_memory
from lora_exp.train.costs.workload import BYTES, Workload

MOST_BATCH = 2**20  # as config/number_ranges.py


@dataclass(frozen=True)
class Hardware:
  """The devices of a plan."""

  kind: DeviceKind | None  # None: not in the table
  memory: int  # usable bytes of each device
  platform: str  # cpu, gpu, tpu

  @property
  def on_cpu(self) -> bool:
    """Whether the devices are CPUs."""
    return self.platform == "cpu"


@dataclass(frozen=True)
class PlanEstimate:
  """The estimate for one trial."""

  work: Workload
  hardware: Hardware
  memory: StepMemory
  flops: StepFlops
  collectives: list[Collective]

  @property
  def fits(self) -> bool:
    """Whether the step fits in the memory of a device."""
    return self.memory.total <= self.hardware.memory

  @property
  def further(self) -> int:
    """The bytes of each further trial on a device: its state, twice, and on accelerators its own step."""
    return 2 * self.memory.state + (0 if self.loops else self.memory.work)

  @property
  def loops(self) -> bool:
    """Whether the trials of a pack take turns, as on a CPU; otherwise they are computed together."""
    return self.hardware.on_cpu and self.work.rules.sizes["trial"] == 1

  @property
  def largest_pack(self) -> int:
    """The largest number of equal trials that fit; 0 if one does not fit."""
    if not self.fits:
      return 0
    here = 1 + (self.hardware.memory - self.memory.total) // max(1, self.further)
    return here * self.work.rules.sizes["trial"]

  @property
  def device_flops(self) -> float:
    """The FLOPs of one device in a step."""
    return self.flops.total / (self.work.batch_ways * self.work.tensor_ways)

  def seconds(self) -> dict[str, float]:
    """The minimum seconds of a step by each bound: compute, memory, and communication if there is any."""
    kind = self.hardware.kind
    if kind is None:
      return {}
    bounds = {
      "compute": self.device_flops / kind.rate(self.work.cfg.model.dtype),
      "memory": _touched_bytes(self) / kind.bandwidth,
    }
    sent = sent_bytes(self.collectives)
    return bounds | ({"communication": sent / kind.link} if sent else {})


def make_estimate(work: Workload, hardware: Hardware) -> PlanEstimate:
  """The estimate of a step of `work` on `hardware`."""
  memory = step_memory(work, hardware.platform)
  return PlanEstimate(work, hardware, memory, step_flops(work), collectives_of(work))


def _touched_bytes(estimate: PlanEstimate) -> int:
  """The bytes that a device reads and writes in a step, at least: each array once for each use.

  Kernels are read in the forward and in the backward pass of each microbatch (and once more with remat), features are
  written once and read once, and the optimizer reads and writes its state.
  """
  memory, cfg = estimate.memory, estimate.work.cfg
  parts = cfg.optim.accumulate
  chunks = math.ceil(4 * estimate.work.tokens * estimate.work.vocab_size / estimate.work.tensor_ways)
  passes = 3 if cfg.model.remat else 2
  kernels = passes * (memory.base + memory.gathered + memory.kernels)
  return parts * (kernels + 2 * memory.activations + 2 * chunks) + 2 * (memory.state + memory.gradients)


def largest_batch(estimate: PlanEstimate) -> int:
  """The largest train.batch_size that fits, a multiple of the batch shards; 0 if one row per shard does not fit."""
  work, hardware = estimate.work, estimate.hardware
  step = work.batch_ways * work.cfg.optim.accumulate

  def fits(multiple: int) -> bool:
    larger = work.with_settings(train={"batch_size": multiple * step})
    return step_memory(larger, hardware.platform).total <= hardware.memory

  low, high, most = 0, 1, MOST_BATCH // step
  while high <= most and fits(high):
    low, high = high, 2 * high
  high = min(high, most + 1)
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if fits(middle) else (low, middle)
  return low * step


def cache_bytes(work: Workload) -> int:
  """The bytes of keys and values of one row of `model.max_len` positions on one device, while text is sampled."""
  model = work.cfg.model
  if work.numeric:
    return 0
  features = model.arch.kv_heads * model.arch.head_dim if model.arch is not None else model.width
  positions = min(model.max_len, work.cfg.data.seq_len + work.cfg.sample.max_tokens)
  return 2 * model.layers * features * positions * BYTES[model.dtype] // work.tensor_ways

"""Published figures of devices, for the bounds of a plan. No jax.

Rates are those of dense matrix products, without sparsity; real steps reach a part of them.
"""

from dataclasses import dataclass

from lora_exp.config.schema import PlanConfig
from lora_exp.runtime.byte_sizes import parse_size

USABLE = 0.95  # of the stated memory of a device
GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class DeviceKind:
  """The peak rates and the memory of a device."""

  name: str
  bf16: float  # FLOPs per second of matrix products in bfloat16
  fp32: float  # the same for float32 arrays at JAX's default precision: TF32 on GPUs, bfloat16 on TPUs
  memory: float  # bytes
  bandwidth: float  # bytes per second between memory and cores
  link: float  # bytes per second that a device can send to the others

  @property
  def platform(self) -> str:
    """What JAX calls its platform: cpu, gpu, tpu."""
    first = self.name.split()[0].rstrip(",").lower()
    return first if first in ("cpu", "tpu") else "gpu"

  def rate(self, dtype: str) -> float:
    """FLOPs per second of matrix products in `dtype`."""
    return self.bf16 if dtype == "bfloat16" else self.fp32


KINDS = {
  # NVIDIA data sheets: "H100 Tensor Core GPU" (SXM5), "H200", "A100 80GB" (SXM4), "B200" (HGX), "L4", "L40S"; half of
  # the figures with sparsity. Links: half of NVLink's bidirectional figure, or PCIe 4.0 x16.
  "h100": DeviceKind("H100 SXM", 989 * TERA, 494 * TERA, 80 * GB, 3350 * GB, 450 * GB),
  "h200": DeviceKind("H200 SXM", 989 * TERA, 494 * TERA, 141 * GB, 4800 * GB, 450 * GB),
  "b200": DeviceKind("B200", 2250 * TERA, 1125 * TERA, 180 * GB, 7700 * GB, 900 * GB),
  "a100": DeviceKind("A100 80GB SXM", 312 * TERA, 156 * TERA, 80 * GB, 2039 * GB, 300 * GB),
  "a100_40gb": DeviceKind("A100 40GB SXM", 312 * TERA, 156 * TERA, 40 * GB, 1555 * GB, 300 * GB),
  "l4": DeviceKind("L4", 121 * TERA, 60 * TERA, 24 * GB, 300 * GB, 32 * GB),
  "l40s": DeviceKind("L40S", 362 * TERA, 183 * TERA, 48 * GB, 864 * GB, 32 * GB),
  # NVIDIA's "Ada GPU architecture" and "GA102" white papers: bfloat16 with float32 accumulation. PCIe 4.0 x16.
  "rtx4090": DeviceKind("RTX 4090", 165 * TERA, 83 * TERA, 24 * GB, 1008 * GB, 32 * GB),
  "rtx3090": DeviceKind("RTX 3090", 71 * TERA, 36 * TERA, 24 * GB, 936 * GB, 32 * GB),
  # Google Cloud's pages on TPU system architecture; links: half of the interchip bandwidth of a chip.
  "tpu_v4": DeviceKind("TPU v4", 275 * TERA, 275 * TERA, 32 * GB, 1228 * GB, 150 * GB),
  "tpu_v5e": DeviceKind("TPU v5e", 197 * TERA, 197 * TERA, 16 * GB, 819 * GB, 100 * GB),
  "tpu_v5p": DeviceKind("TPU v5p", 459 * TERA, 459 * TERA, 95 * GB, 2765 * GB, 300 * GB),
  "tpu_v6e": DeviceKind("TPU v6e", 918 * TERA, 918 * TERA, 32 * GB, 1640 * GB, 224 * GB),
}
CORE_FLOPS = 80e9  # of a CPU core: two AVX2 units of 8 float32 multiply-adds at 2.5 GHz
CPU_BANDWIDTH = 40 * GB  # two channels of DDR4-2666


def stated_memory(plan: PlanConfig) -> int | None:
  """The usable bytes of each device, from the memory or the kind that `plan` names; None if it names neither."""
  if plan.memory is not None:
    return int(USABLE * parse_size(plan.memory))
  return int(USABLE * KINDS[plan.kind].memory) if plan.kind is not None else None


def cpu_kind(cores: int, memory: float) -> DeviceKind:
  """A CPU with `cores` cores. XLA computes bfloat16 in float32 there."""
  return DeviceKind(f"CPU, {cores} cores", cores * CORE_FLOPS, cores * CORE_FLOPS, memory, CPU_BANDWIDTH, CPU_BANDWIDTH)


def kind_of_jax(name: str) -> DeviceKind | None:
  """The kind of a device that JAX calls `name`, such as 'NVIDIA H100 80GB HBM3'; None if it is not in the table."""
  text = name.lower().replace("-", " ").replace("lite", "e").replace(" e", "e")
  if "a100" in text and "40gb" in text:
    return KINDS["a100_40gb"]
  words = text.replace(" ", "").replace("geforce", "")
  names = sorted(KINDS, key=len, reverse=True)  # l40s before l4
  return next((KINDS[name] for name in names if name.replace("_", "") in words), None)

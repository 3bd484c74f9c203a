"""The hardware of this machine, and the plan that XLA compiles on it."""

import jax

from lora_exp.config import Config, InputError
from lora_exp.runtime import console
from lora_exp.runtime.byte_sizes import size_text
from lora_exp.runtime.device import core_count, start_jax
from lora_exp.train.compiled_step import compile_abstract
from lora_exp.train.costs.device_kinds import KINDS, cpu_kind, kind_of_jax, stated_memory
from lora_exp.train.costs.memory import device_memory, workload_of
from lora_exp.train.costs.plan_estimate import Hardware, PlanEstimate, make_estimate
from lora_exp.train.costs.step_memory import step_memory
from lora_exp.train.costs.workload import vocabulary_of
from lora_exp.train.plan import Plan, make_plan, without_tokenizer


def hardware_here(cfg: Config) -> tuple[int, Hardware]:
  """(devices, their kind and memory) of this machine, except for values that the group `plan` sets."""
  start_jax(cfg.cache)
  first, plan = jax.devices()[0], cfg.plan
  if plan.compile:
    _require_devices_here(cfg)
  memory = stated_memory(plan) or device_memory()
  kind, platform = kind_of_jax(first.device_kind), first.platform
  if plan.kind is not None:
    kind, platform = KINDS[plan.kind], KINDS[plan.kind].platform
  elif platform == "cpu":
    kind = cpu_kind(core_count(), memory)
  return plan.devices or jax.device_count(), Hardware(kind, memory, platform)


def planned_estimate(cfg: Config, hardware: Hardware) -> PlanEstimate:
  """The estimate from the plan of a run on the devices of this machine, which reads `lora.init_from`."""
  return make_estimate(workload_of(_plan(cfg)), hardware)


def show_comparison(cfg: Config, estimate: PlanEstimate) -> None:
  """Compiles the step on this machine, and shows XLA's memory and FLOPs beside the estimate for its platform."""
  step = compile_abstract(_plan(cfg), 1)
  memory = step_memory(estimate.work, jax.devices()[0].platform).total
  rows = [
    ("memory of a step", size_text(memory), size_text(step.peak_memory_bytes), memory / step.peak_memory_bytes - 1),
    ("FLOPs", f"{estimate.flops.total:.4g}", f"{step.flops:.4g}", estimate.flops.total / step.flops - 1),
  ]  # fmt: skip
  shown = [(*row[:3], f"{row[3]:+.1%}") for row in rows]
  console.show_table("Compiled by XLA on this machine", ("", "estimate", "compiled", "difference"), shown,
                     right=("estimate", "compiled", "difference"))  # fmt: skip


def _plan(cfg: Config) -> Plan:
  """The plan of `cfg` on the devices of this machine."""
  start_jax(cfg.cache, show_device=False)
  _require_devices_here(cfg)
  return make_plan(without_tokenizer(cfg, vocabulary_of(cfg)))


def _require_devices_here(cfg: Config) -> None:
  """Raises InputError if `plan.devices` is not the number of devices of this machine."""
  devices, wanted = jax.device_count(), cfg.plan.devices
  if wanted not in (None, devices):
    given = "plan.compile" if cfg.plan.compile else "a plan with lora.init_from"
    raise InputError(f"plan.devices={wanted}: {given} uses all devices of this machine, and it has {devices}; "
                     f"remove plan.devices, or on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={wanted}")

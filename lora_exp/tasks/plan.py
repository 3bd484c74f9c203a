"""`task=plan`: estimates memory, FLOPs, time and communication of a step from shapes alone, for any hardware.

With plan.compile, XLA compiles the step and its figures are shown beside the estimate.
"""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lora_exp.config import Config, InputError
from lora_exp.config.typed_command import training_command
from lora_exp.runtime import console
from lora_exp.runtime.byte_sizes import UNITS, parse_size
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.files import write_text_atomically
from lora_exp.train.costs.device_kinds import KINDS, stated_memory
from lora_exp.train.costs.plan_estimate import Hardware, PlanEstimate, largest_batch, make_estimate
from lora_exp.train.costs.plan_view import show_plan
from lora_exp.train.costs.workload import make_workload

LEAST_MEMORY = UNITS["KB"]


def run(cfg: Config) -> None:
  """Shows the plan of `cfg` on the hardware of the group `plan`, or on this machine; writes out=DIR/plan.json."""
  devices, hardware = _hardware(cfg)
  if cfg.lora.init_from is None:
    estimate = make_estimate(make_workload(cfg, devices), hardware)
  else:
    estimate = _this_machine().planned_estimate(cfg, hardware)
  show_plan(estimate)
  if cfg.plan.compile:
    _this_machine().show_comparison(cfg, estimate)
  if cfg.out is not None:
    _write(estimate, Path(cfg.out) / "plan.json")
  command = training_command("plan")
  if command is not None:
    console.show_command("\nTrain it:", command)


def _this_machine() -> ModuleType:
  """The module that uses jax, which a plan for stated hardware does not need."""
  return import_module("lora_exp.train.costs.this_machine")


def _hardware(cfg: Config) -> tuple[int, Hardware]:
  """(devices, their kind and memory) as the group `plan` states them; what it leaves out is that of this machine."""
  plan = cfg.plan
  if plan.memory is not None and parse_size(plan.memory) < LEAST_MEMORY:
    raise InputError(f"plan.memory={plan.memory}: must be at least 1KB; give a number with a unit, such as 24GB")
  if plan.compile or (plan.kind is None and (plan.memory is None or plan.devices is None)):
    here: tuple[int, Hardware] = _this_machine().hardware_here(cfg)
    return here
  kind = KINDS[plan.kind] if plan.kind is not None else None
  return plan.devices or 1, Hardware(kind, stated_memory(plan) or 0, kind.platform if kind else "gpu")


def _write(estimate: PlanEstimate, path: Path) -> None:
  """Writes the figures of the estimate as JSON."""
  work = estimate.work
  content = {
    "parameters": {"base": work.base_parameters, "trained": work.trained_parameters},
    "mesh": dict(work.rules.sizes),
    "memory_bytes": asdict(estimate.memory) | {"total": estimate.memory.total},
    "usable_bytes": estimate.hardware.memory,
    "further_trial_bytes": estimate.further,
    "flops": asdict(estimate.flops) | {"total": estimate.flops.total},
    "tokens": work.step_tokens,
    "seconds_at_least": estimate.seconds(),
    "collectives": [asdict(item) for item in estimate.collectives],
    "fits": estimate.fits,
    "largest_batch": largest_batch(estimate),
    "largest_pack": estimate.largest_pack,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  write_text_atomically(path, json.dumps(content, indent=1) + "\n")
  console.show(f"Written: {display_path(path)}")

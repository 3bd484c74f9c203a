"""Settings to change if a step does not fit in memory, each with the estimated memory of the changed step. No jax."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from lora_exp.train.costs.plan_estimate import PlanEstimate
from lora_exp.train.costs.step_memory import step_memory
from lora_exp.train.costs.workload import Workload

MOST_TENSOR = 16  # devices of a node


@dataclass(frozen=True)
class Change:
  """Overrides that save memory, and the memory of the step with them."""

  overrides: str
  reason: str
  memory: int  # bytes on a device
  fits: bool


def advice(estimate: PlanEstimate) -> list[Change]:
  """The single changes that make the step fit; if none does, all of them together, one after the other."""
  single = [_change(estimate, *found) for make in CHANGES for found in make(estimate, estimate.work)]
  if any(change.fits for change in single):
    return [change for change in single if change.fits]
  together, overrides, least = estimate.work, list[str](), estimate.memory.total
  for make in CHANGES:
    for text, _, work in make(replace(estimate, work=together), together):
      change = _change(estimate, " ".join([*overrides, text]), "together", work)
      if change.memory >= least:
        continue  # smaller microbatches keep a sum of gradients, which can be more than they save
      together, overrides, least = work, [*overrides, text], change.memory
      if change.fits:
        return [change]
  return [_change(estimate, " ".join(overrides), "together; it still does not fit", together)] if overrides else []


def _change(estimate: PlanEstimate, overrides: str, reason: str, work: Workload) -> Change:
  memory = step_memory(work, estimate.hardware.platform).total
  return Change(overrides, reason, memory, memory <= estimate.hardware.memory)


Found = Iterator[tuple[str, str, Workload]]  # overrides, reason, changed workload


def _half_precision(estimate: PlanEstimate, work: Workload) -> Found:
  if work.cfg.model.param_dtype == "float32" and not work.method.trains_everything:
    changed = work.with_settings(model={"param_dtype": "bfloat16", "dtype": "bfloat16"})
    yield "model.param_dtype=bfloat16 model.dtype=bfloat16", "a base in half of the bytes", changed


def _remat(estimate: PlanEstimate, work: Workload) -> Found:
  if not work.cfg.model.remat and not estimate.hardware.on_cpu:
    yield "model.remat=true", "features are computed again, for a third more time", work.with_settings(
      model={"remat": True}
    )


def _microbatches(estimate: PlanEstimate, work: Workload) -> Found:
  """The fewest microbatches that fit, or the most that there can be."""
  parts, batch = work.cfg.optim.accumulate, work.cfg.train.batch_size
  changed = None
  while batch % (2 * parts * work.batch_ways) == 0:
    parts *= 2
    changed = work.with_settings(optim={"accumulate": parts})
    if step_memory(changed, estimate.hardware.platform).total <= estimate.hardware.memory:
      break
  if changed is not None:
    yield f"optim.accumulate={parts}", "smaller microbatches", changed


def _quantised(estimate: PlanEstimate, work: Workload) -> Found:
  if work.table and work.cfg.lora.quant is None:
    yield "lora.quant=nf4", "a base in 4 bits", work.with_settings(lora={"quant": "nf4"})


def _tensor_parallel(estimate: PlanEstimate, work: Workload) -> Found:
  """The smallest split of heads and feed-forward that fits, or the largest within a node."""
  best = None
  ways = 2 * work.tensor_ways
  while ways <= MOST_TENSOR and work.devices % ways == 0:
    changed = _with_mesh(work, data=work.devices // ways, fsdp=1, tensor=ways)
    if changed is not None:
      best = (ways, changed)
      if step_memory(changed, estimate.hardware.platform).total <= estimate.hardware.memory:
        break
    ways *= 2
  if best is not None:
    yield f"mesh.data=-1 mesh.fsdp=1 mesh.tensor={best[0]}", "each device holds a part of each matrix", best[1]


def _sharded(estimate: PlanEstimate, work: Workload) -> Found:
  """All devices hold parts of the base."""
  changed = _with_mesh(work, data=1, fsdp=work.devices // work.tensor_ways, tensor=work.tensor_ways)
  if work.rules.sizes["fsdp"] == 1 and work.devices > work.tensor_ways and changed is not None:
    yield "mesh.data=1 mesh.fsdp=-1", "each device holds a part of the base", changed


def _with_mesh(work: Workload, **sizes: int) -> Workload | None:
  """The workload on a mesh of other sizes; None if the batch does not divide."""
  changed = replace(work, rules=replace(work.rules, sizes={**work.rules.sizes, **sizes}))
  return None if changed.microbatch % changed.batch_ways else changed


CHANGES: tuple[Callable[[PlanEstimate, Workload], Found], ...] = (
  _half_precision, _remat, _microbatches, _quantised, _tensor_parallel, _sharded,
)  # fmt: skip

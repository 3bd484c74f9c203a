"""The tables of an estimated plan. No jax."""

from dataclasses import fields

from lora_exp.runtime import console
from lora_exp.runtime.byte_sizes import size_text
from lora_exp.train.costs.plan_advice import advice
from lora_exp.train.costs.plan_estimate import PlanEstimate, cache_bytes, largest_batch
from lora_exp.train.costs.step_memory import StepMemory, activation_bytes

KINDS = {
  "base": "frozen parameters",
  "adapters": "trained parameters and constants",
  "optimizer": "moments",
  "batch": "tokens, targets, positions",
  "gradients": "of what is trained, and updates",
  "activations": "kept for the backward pass",
  "kernels": "that are formed: W + s·A·B, or W in another dtype",
  "logits": "a chunk of them",
  "gathered": "parameters gathered over fsdp",
}


def show_plan(estimate: PlanEstimate) -> None:
  """Shows parameters, memory by kind, operations and their time, communication, and what fits."""
  show_counts(estimate)
  show_memory(estimate.memory)
  _show_step(estimate)
  _show_collectives(estimate)
  _show_limits(estimate)


def show_counts(estimate: PlanEstimate) -> None:
  """Shows the parameters of the base and the trained ones."""
  work = estimate.work
  base, trained = work.base_parameters, work.trained_parameters
  method, lora = work.method, work.cfg.lora
  facts: dict[str, object] = {"base": base, "trained": f"{trained:,} ({100 * trained / base:.3g} % of the base)"}
  if work.table:
    facts["adapted modules"] = f"{len(work.table):,}, rank {lora.rank}" if method.uses_rank else len(work.table)
  console.show_facts(f"Parameters, model.family={work.cfg.model.family} lora.method={method.name}", facts)


def show_memory(memory: StepMemory) -> None:
  """Shows the bytes by kind; they add up to the total."""
  rows = [(field.name, size_text(getattr(memory, field.name)), KINDS[field.name]) for field in fields(memory)
          if getattr(memory, field.name)]  # fmt: skip
  rows.append(("total", size_text(memory.total), "the peak of a step"))
  console.show_table("Memory of a step on each device", ("kind", "size", "of"), rows, right=("size",))


def _show_step(estimate: PlanEstimate) -> None:
  """Shows the operations of a step, and the bounds of its time."""
  work, flops = estimate.work, estimate.flops
  parts = {"forward": flops.forward, "backward": flops.backward, "adapters": flops.adapters,
           "recomputed": flops.recomputed}  # fmt: skip
  facts: dict[str, object] = {"tokens": work.step_tokens}
  facts["FLOPs"] = f"{_count(flops.total)}: " + ", ".join(f"{name} {n:.3g}" for name, n in parts.items() if n)
  facts["FLOPs a token"] = _count(flops.total / max(1, work.step_tokens))
  seconds = estimate.seconds()
  if seconds:
    longest = max(seconds, key=seconds.__getitem__)
    facts["time of a step"] = f"at least {_time(seconds[longest])}, bound by {longest}"
    facts["bounds"] = ", ".join(f"{name} {_time(value)}" for name, value in seconds.items())
    facts["tokens a second"] = f"at most {work.step_tokens / seconds[longest]:,.0f}"
  console.show_facts("One optimizer step, all devices together", facts)


def _show_collectives(estimate: PlanEstimate) -> None:
  """Shows what the devices send to each other."""
  if estimate.collectives:
    sizes = " × ".join(f"{axis} {n}" for axis, n in estimate.work.rules.sizes.items() if n > 1)
    rows = [(item.name, item.of, item.axis, item.count, size_text(item.bytes)) for item in estimate.collectives]
    columns = ("collective", "of", "mesh axis", "in a step", "each sends")
    console.show_table(f"Communication, mesh {sizes}", columns, rows, right=("each sends",))


def _show_limits(estimate: PlanEstimate) -> None:
  """Shows what fits in memory, and what to change if the step does not."""
  work, hardware = estimate.work, estimate.hardware
  batch, pack, cache = largest_batch(estimate), estimate.largest_pack, cache_bytes(work)
  name = hardware.kind.name if hardware.kind else "device of an unknown kind"
  facts: dict[str, object] = {
    "devices": f"{work.devices:,} × {name}, {size_text(hardware.memory)} usable each",
    "this step": f"{'fits' if estimate.fits else 'does not fit'} ({estimate.memory.total / hardware.memory:.0%})",
    "each further trial": size_text(estimate.further),
    "largest batch": f"train.batch_size={batch:,}" if batch else "none",
    "largest pack": f"{pack:,} trial{'s' if pack > 1 else ''}" if pack else "none",
  }
  if not hardware.on_cpu and not work.cfg.model.remat and not work.numeric:
    recomputed = activation_bytes(work, hardware.platform, remat=True)
    facts["with model.remat"] = f"activations {size_text(recomputed)}, now {size_text(estimate.memory.activations)}"
  if cache:
    facts["cache of a sample"] = f"{size_text(cache)}, keys and values, between steps"
  console.show_facts("What fits", facts)
  if not estimate.fits:
    changes = advice(estimate)
    title = "Settings with which it fits" if any(change.fits for change in changes) else "No setting makes it fit"
    rows = [(change.overrides, size_text(change.memory), change.reason) for change in changes]
    console.show_table(title, ("settings", "memory", "why"), rows, right=("memory",))


def _count(number: float) -> str:
  """A number, with its digits up to a billion."""
  return f"{number:,.0f}" if number < 1e9 else f"{number:.4g}"


def _time(seconds: float) -> str:
  """Seconds with a unit that gives at least 1."""
  for unit, factor in (("s", 1), ("ms", 1e3)):
    if seconds * factor >= 1:
      return f"{seconds * factor:.3g} {unit}"
  return f"{seconds * 1e6:.3g} µs"

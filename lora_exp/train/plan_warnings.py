"""Warnings before training about settings that are valid but may not do what is expected."""

from collections.abc import Iterator, Sequence

from lora_exp.lora import methods
from lora_exp.train.plan import Plan


def plan_warnings(plans: Sequence[Plan], steps: int) -> list[str]:
  """The warnings for the trials `plans`, which train for `steps` steps; each once."""
  found: list[str] = []
  for plan in plans:
    found += [*_rank_warnings(plan), *_warmup_warnings(plan, steps)]
  return list(dict.fromkeys(found))


def _rank_warnings(plan: Plan) -> Iterator[str]:
  """A warning if a rank is above the smaller side of its kernel, which bounds the rank of the update."""
  method = methods.of(plan.cfg.lora)
  if not method.uses_rank or method.shared_leaves:
    return
  high = [row for row in plan.table if row.rank > min(row.fan_in, row.fan_out)]
  if high:
    row = high[0]
    others = f" and {len(high) - 1} other modules" if len(high) > 1 else ""
    yield (f"rank {row.rank} is above the smaller side of {row.path} ({row.fan_in}×{row.fan_out}){others}: its update "
           f"has a rank of at most {min(row.fan_in, row.fan_out)}, and the other columns only take memory")


def _warmup_warnings(plan: Plan, steps: int) -> Iterator[str]:
  """A warning if the learning rate does not reach its peak."""
  warmup = plan.cfg.optim.warmup
  if 0 < steps <= warmup:
    yield (f"optim.warmup={warmup} is not below the {steps} steps of training, so the learning rate does not reach "
           f"optim.lr={plan.cfg.optim.lr:g}; lower optim.warmup, or train for longer")

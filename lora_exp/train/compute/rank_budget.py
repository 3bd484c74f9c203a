"""The rank of the adapters from a number of parameters, and ranks that are too large. No jax."""

from collections.abc import Callable, Sequence

from lora_exp.config import InputError, LoraConfig
from lora_exp.config.conversion import shown
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.method_declaration import MethodDeclaration

MOST_SIDES = 16  # a rank above this many times the larger side of its kernel is refused


def rank_of_budget(lora: LoraConfig, base: int, count: Callable[[int], int]) -> int:
  """The rank whose number of adapter parameters, `count(rank)`, is nearest to `lora.parameters`.

  `base` is the number of the base's parameters. Raises InputError if rank 1 has more than `lora.parameters`.
  """
  budget = lora.parameters
  assert budget is not None
  target = budget if budget >= 1 else budget * base
  least, step = count(1), count(2) - count(1)  # the count is linear in the rank for every method
  if target < least:
    given = f"{budget:.0f}" if budget >= 1 else f"{budget} ({target:,.0f} of the base's {base:,} parameters)"
    raise InputError(
      f"lora.parameters={given}: rank 1 on lora.targets={shown(lora.targets)} takes {least:,}; give at least that, "
      "or fewer targets"
    )
  return 1 + round((target - least) / step)


def rank_problems(table: Sequence[AdaptedModule], method: MethodDeclaration) -> list[str]:
  """A problem if a rank is many times both sides of its kernel. Factors that all modules share may have any rank."""
  row = next((row for row in table if row.rank > MOST_SIDES * max(row.fan_in, row.fan_out)), None)
  if row is None or method.shared_leaves:
    return []
  return [f"rank {row.rank:,} of {row.path}: its kernel is {row.fan_in}×{row.fan_out}, and no update of it has a rank "
          f"above {min(row.fan_in, row.fan_out)}; lower lora.rank, lora.rank_pattern or lora.parameters"]

"""What the settings of `lora` select in a model: adapted modules, their rank, parameters trained in full. No jax.

A run selects from its abstract model, and task=plan from shapes alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_exp.config import InputError, LoraConfig
from lora_exp.config.conversion import shown
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.full_targets import select_full_paths
from lora_exp.lora.method_declaration import MethodDeclaration
from lora_exp.lora.target_table import KernelShape, Presets, target_settings, target_table

MOST_SIDES = 16  # a rank above this many times the larger side of its kernel is refused


@dataclass(frozen=True)
class SelectedTargets:
  """The targets of a run."""

  lora: LoraConfig  # with the rank from `lora.parameters`
  table: list[AdaptedModule]
  full: list[str]  # dotted paths of parameters trained in full, in addition to the adapters


def select_targets(
  lora: LoraConfig,
  method: MethodDeclaration,
  kernels: Mapping[str, KernelShape],
  parameters: Mapping[str, int],
  presets: Presets,
) -> SelectedTargets:
  """Selects from the `kernels` of a model by module path, and from its `parameters`: path -> number of values.

  Raises InputError that lists every problem.
  """

  def table_of(lora: LoraConfig) -> list[AdaptedModule]:
    """The adapted modules; [] if the method has no adapters."""
    return target_table(kernels, method, target_settings(lora), presets) if method.adapts_kernels else []

  def count(rank: int) -> int:
    """The parameters of the adapters at this rank."""
    return sum(row.parameters for row in table_of(replace(lora, rank=rank)))

  if lora.parameters is not None and method.adapts_kernels:
    lora = replace(lora, rank=_rank_of_budget(lora, sum(parameters.values()), count))
  table, full, problems = list[AdaptedModule](), list[str](), list[str]()
  try:
    table = table_of(lora)
  except InputError as error:
    problems += error.problems
  problems += _rank_problems(table, method)
  try:
    full = select_full_paths(list(parameters), table, lora.bias, lora.train_modules)
  except InputError as error:
    problems += error.problems
  if problems:
    raise InputError(problems)
  return SelectedTargets(lora, table, full)


def _rank_of_budget(lora: LoraConfig, base: int, count: Callable[[int], int]) -> int:
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


def _rank_problems(table: Sequence[AdaptedModule], method: MethodDeclaration) -> list[str]:
  """A problem if a rank is many times both sides of its kernel. Factors that all modules share may have any rank."""
  row = next((row for row in table if row.rank > MOST_SIDES * max(row.fan_in, row.fan_out)), None)
  if row is None or method.shared_leaves:
    return []
  return [f"rank {row.rank:,} of {row.path}: its kernel is {row.fan_in}×{row.fan_out}, and no update of it has a rank "
          f"above {min(row.fan_in, row.fan_out)}; lower lora.rank, lora.rank_pattern or lora.parameters"]

"""Grouping of a sweep's runs into packs: runs that can train as one program, as many as fit in memory."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lora_exp.config import Config, InputError
from lora_exp.data.sources import source_class
from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.sweep.ledger import Ledger
from lora_exp.sweep.packs.planned_run import PlannedRun
from lora_exp.train.compute.trial_padding import union
from lora_exp.train.costs.memory import device_memory, nbytes, widest

# Settings in which the trials of a pack may differ: numbers that are arrays in the step, and sizes that are padded.
TRIAL_SETTINGS = {
  "": ("name", "seed"),
  "lora": (
    "rank", "parameters", "alpha", "targets", "exclude", "layers", "rank_pattern", "alpha_pattern", "scaling",
    "init_std", "lr_ratio", "lr_scale", "budget",
  ),
  "optim": ("lr", "weight_decay"),
}  # fmt: skip
# Ranks of one bucket train together, padded to the largest. More buckets need less padding but more compilation.
BUCKETS = (16, 64, 256)


@dataclass(frozen=True)
class SweepPack:
  """Runs of a sweep that train as one program."""

  runs: list[PlannedRun]
  memory: int  # estimated bytes on one device

  @property
  def numbers(self) -> list[int]:
    return [run.number for run in self.runs]


def make_packs(runs: Sequence[PlannedRun], width: int | None, ledger: Ledger) -> list[SweepPack]:
  """The packs of a sweep: those in the ledger unchanged, and new ones for the other runs.

  `width` is the maximum number of runs in a pack. Raises InputError if it is not a positive integer.
  """
  if width is not None and (not isinstance(width, int) or width < 1):
    raise InputError(f"hydra.launcher.width={width}: give a positive integer, or null for what fits in memory")
  by_number = {run.number: run for run in runs}
  recorded = [[by_number.pop(number) for number in pack if number in by_number] for pack in ledger.packs()]
  return [_make_pack(pack) for pack in recorded if pack] + group_runs(list(by_number.values()), width)


def group_runs(runs: Sequence[PlannedRun], width: int | None = None) -> list[SweepPack]:
  """Groups runs that can share a program into packs: as many as fit in memory, at most `width` each."""
  groups: dict[str, list[PlannedRun]] = {}
  for run in runs:
    groups.setdefault(shared_settings(run.plan.saved_cfg), []).append(run)
  available = device_memory()
  return [pack for group in groups.values() for pack in _split_group(group, width, available)]


def _split_group(group: list[PlannedRun], width: int | None, available: int) -> list[SweepPack]:
  """Splits runs that can share a program into packs that fit in `available` bytes."""
  need = widest([run.plan for run in group])
  most = max(1, need.most(available))
  return [SweepPack(part, need.of(len(part))) for part in split_evenly(group, min(most, width or most), need.ways)]


def _make_pack(runs: list[PlannedRun]) -> SweepPack:
  return SweepPack(runs, widest([run.plan for run in runs]).of(len(runs)))


def split_evenly(group: Sequence[Any], most: int, ways: int = 1) -> list[list[Any]]:
  """Splits `group` into the fewest parts of at most `most` elements. Sizes are nearly equal, to compile few programs.

  If trials are split over `ways` devices, sizes are multiples of `ways` where `most` allows it.
  """
  parts = math.ceil(len(group) / most)
  size = math.ceil(len(group) / parts)
  if (multiple := math.ceil(size / ways) * ways) <= most:
    size = multiple
  return [list(group[i : i + size]) for i in range(0, len(group), size)]


def shared_settings(cfg: Config) -> str:
  """The settings that must be equal within a pack, as JSON.

  With adapter dropout, trials with different `train.seed` train in different packs: trials of one seed share their
  masks, and separate masks would make a step 20 % slower. The dropout of the base has no measurable cost. `data.seed`
  may differ if it decides only the order of the rows.
  """
  settings: dict[str, Any] = asdict(cfg)
  for group, names in TRIAL_SETTINGS.items():
    for name in names:
      (settings[group] if group else settings).pop(name)
  lora, method = cfg.lora, methods.of(cfg.lora)
  settings["lora"] |= {"dropout": lora.dropout > 0, "method": method.name, "init": None}
  settings["optim"]["clip"] = cfg.optim.clip is None
  if lora.dropout == 0:
    settings["train"]["seed"] = None
  if "seed" not in [setting.name for setting in fields(source_class(cfg.data.source))]:
    settings["data"]["seed"] = None
  if method.uses_rank:
    settings["bucket"] = rank_bucket(max([lora.rank, *(lora.rank_pattern or {}).values()]))
  if not method.paddable:
    settings["rank"] = [lora.rank, lora.rank_pattern]
  if method.shared_leaves:  # their size depends on the largest target
    settings["lora"]["targets"] = [lora.targets, lora.exclude, lora.layers]
  return json.dumps(settings, sort_keys=True, default=str)


def rank_bucket(rank: int) -> int:
  """The smallest of `BUCKETS` that is at least `rank`; a larger rank has a separate bucket."""
  return next((size for size in BUCKETS if rank <= size), rank)


def show_packs(packs: Sequence[SweepPack]) -> None:
  """Shows which runs train together and their estimated memory."""
  rows = []
  for number, pack in enumerate(packs):
    cfgs = [run.plan.saved_cfg for run in pack.runs]
    ranks, seeds = sorted({c.lora.rank for c in cfgs}), sorted({c.train.seed for c in cfgs})
    rates, memory = sorted({c.optim.lr for c in cfgs}), nbytes(pack.memory)
    rows.append((number, len(cfgs), cfgs[0].lora.method, ranks, seeds, rates, memory, _ranges(pack.numbers)))
  columns = ("pack", "trials", "lora", "ranks", "seeds", "lr", "memory", "runs")
  console.show_table("Packs: runs that train as one program", columns, rows)
  console.show(f"Available memory: {nbytes(device_memory())}. Packs are as wide as fits by the estimate of task=plan.")


def _ranges(numbers: Sequence[int]) -> str:
  """Run numbers as '3-5' if they are consecutive, else as a list."""
  consecutive = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
  return f"{numbers[0]}-{numbers[-1]}" if consecutive and len(numbers) > 1 else ", ".join(map(str, numbers))


def without_pruned(runs: list[PlannedRun], ledger: Ledger) -> list[PlannedRun]:
  """The runs of a pack without those that a study pruned, except runs that determine the shapes of the pack.

  The remaining runs then have the same arrays, and therefore the same losses, as in the full pack.
  """
  remaining = runs
  for run in runs:
    others = [other for other in remaining if other is not run]
    if ledger.state(run.number) == "pruned" and len(others) > 1 and _ranks(others) == _ranks(runs):
      remaining = others
  return remaining


def _ranks(runs: Sequence[PlannedRun]) -> dict[str, int]:
  """The largest rank of each module that any run adapts."""
  return {row.path: row.rank for row in union([run.plan.table for run in runs])}

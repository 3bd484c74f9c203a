"""Which jobs of a sweep can train as one program over one base, and how many of them at a time."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_exp.config import Config, InputError
from lora_exp.lora import methods
from lora_exp.train.memory import MemoryEstimate, device_memory, widest
from lora_exp.train.plan import make_plan

# What a trial may have of its own: numbers that enter the compiled step as arrays, and shapes that are padded.
OWN = {
  "": ("name",),
  "lora": (
    "rank", "parameters", "alpha", "targets", "exclude", "layers", "rank_pattern", "alpha_pattern", "scaling",
    "init_std", "lr_ratio", "lr_scale", "budget",
  ),
  "optim": ("lr", "weight_decay"),
}  # fmt: skip
# Ranks are padded to the largest of their bucket: far above it a small rank costs too much, and every bucket compiles.
BUCKETS = (16, 64, 256)


def groups(cfgs: Sequence[Config], width: int | None = None) -> list[list[int]]:
  """Numbers of `cfgs` that train together, in order of first appearance: as many as fit in memory, at most `width`."""
  found: dict[str, list[int]] = {}
  for n, cfg in enumerate(cfgs):
    found.setdefault(shared(cfg), []).append(n)
  memory, packs = device_memory(), []
  for members in found.values():
    need = needed([cfgs[n] for n in members])
    most = len(members) if need is None else max(1, need.most(memory))
    packs += cut(members, min(most, width or most), 1 if need is None else need.ways)
  return packs


def needed(cfgs: Sequence[Config]) -> MemoryEstimate | None:
  """What a pack of `cfgs` takes of the memory, of those that can be built; None if none can."""
  plans = []
  for cfg in cfgs:
    try:
      plans.append(make_plan(cfg))
    except InputError:  # told where the trial is to be trained
      continue
  return widest(plans) if plans else None


def cut(members: Sequence[int], most: int, ways: int = 1) -> list[list[int]]:
  """`members` in as few parts of at most `most` as there can be, about alike: equal ones share a compiled program.

  Where trials are split over `ways` devices, parts are multiples of that if `most` leaves room.
  """
  parts = math.ceil(len(members) / most)
  size = math.ceil(len(members) / parts)
  if (whole := math.ceil(size / ways) * ways) <= most:
    size = whole
  return [list(members[i : i + size]) for i in range(0, len(members), size)]


def shared(cfg: Config) -> str:
  """What must be equal within a pack, as text: all settings but the trial's own.

  Trials of one seed drop alike, and their masks are made once for all of them. Where every adapter drops its input, masks
  for each seed cost a fifth of a step, so that seeds train apart; those of the base alone cost too little to measure.
  """
  node: dict[str, Any] = asdict(cfg)
  for group, names in OWN.items():
    for name in names:
      (node[group] if group else node).pop(name)
  lora = cfg.lora
  node["lora"]["dropout"] = lora.dropout > 0
  method = methods.of(lora)
  node["lora"] |= {"method": method.name, "init": None}
  node["optim"]["clip"] = cfg.optim.clip is None
  if lora.dropout == 0:
    node["train"]["seed"] = None
  if method.uses_rank:
    node["bucket"] = bucket(max([lora.rank, *(lora.rank_pattern or {}).values()]))
  if not method.paddable:
    node["rank"] = [lora.rank, lora.rank_pattern]
  if method.shared_leaves:  # they are as large as the largest target
    node["lora"]["targets"] = [lora.targets, lora.exclude, lora.layers]
  return json.dumps(node, sort_keys=True, default=str)


def bucket(rank: int) -> int:
  """The smallest of `BUCKETS` that holds `rank`; a larger one is its own."""
  return next((size for size in BUCKETS if rank <= size), rank)

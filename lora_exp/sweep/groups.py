"""Which jobs of a sweep can train as one program over one base."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_exp.config import ADAPTERS, Config

# What an arm may have of its own: numbers that enter the compiled step as arrays, and shapes that are padded.
OWN = {
  "": ("name",),
  "lora": (
    "rank", "parameters", "alpha", "targets", "exclude", "layers", "rank_pattern", "alpha_pattern", "scaling",
    "init_std", "lr_ratio", "lr_scale", "budget",
  ),
  "optim": ("lr", "weight_decay"),
}  # fmt: skip
BUCKETS = (8, 32, 128)  # ranks are padded to the largest of their bucket: far above it a small rank costs too much


def groups(cfgs: Sequence[Config], width: int) -> list[list[int]]:
  """Numbers of `cfgs` that train together, in order of first appearance, at most `width` in a group."""
  found: dict[str, list[int]] = {}
  for n, cfg in enumerate(cfgs):
    found.setdefault(shared(cfg), []).append(n)
  return [members[i : i + width] for members in found.values() for i in range(0, len(members), width)]


def shared(cfg: Config) -> str:
  """What must be equal within a pack, as text: all settings but the arm's own.

  Dropout draws one mask for all arms of a pack, from train.seed: with dropout, arms of other seeds train apart, so that
  each is what it would be alone.
  """
  node: dict[str, Any] = asdict(cfg)
  for group, names in OWN.items():
    for name in names:
      (node[group] if group else node).pop(name)
  lora = cfg.lora
  dropout = lora.dropout > 0 or (cfg.model.dropout > 0 and cfg.data.teacher is None)
  node["lora"]["dropout"] = lora.dropout > 0
  node["lora"]["init"] = lora.init if lora.init in ("pissa", "olora") else None
  node["optim"]["clip"] = cfg.optim.clip is None
  if not dropout:
    node["train"]["seed"] = None
  if lora.method in ADAPTERS:
    node["bucket"] = bucket(max([lora.rank, *(lora.rank_pattern or {}).values()]))
  if lora.method == "vera":  # its matrices are as large as the largest target
    node["lora"]["targets"] = [lora.targets, lora.exclude, lora.layers]
  return json.dumps(node, sort_keys=True, default=str)


def bucket(rank: int) -> int:
  """The smallest of `BUCKETS` that holds `rank`; a larger one is its own."""
  return next((size for size in BUCKETS if rank <= size), rank)

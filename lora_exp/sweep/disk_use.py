"""The disk space that a sweep will need, from the plans of its largest trials."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from lora_exp.config import Config, InputError
from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.runtime.byte_sizes import size_text
from lora_exp.train.plan import Plan, make_plan

KEPT_CHECKPOINTS = 3  # the newest two and that of the best step
OTHER_FILES = 300_000  # bytes of a trial's metrics, held-out losses, plots and logs


def show_disk_use(cfgs: Sequence[Config], directory: Path) -> None:
  """Shows how much the trials `cfgs` take in `directory` at most; warns if it is more than is free."""
  sizes = trial_sizes(cfgs)
  if not sizes:
    return
  free = shutil.disk_usage(directory).free
  total = f"{size_text(sum(sizes))} for {len(sizes)} trials"
  console.show(f"Disk: up to {total}, up to {size_text(max(sizes))} each; {size_text(free)} is free.")
  if sum(sizes) > free:
    console.show_warning(f"the sweep may take {total}, but only {size_text(free)} is free in {directory}; free "
                         "some space (task=clean), or give hydra.sweep.dir=DIR on another disk")


def trial_sizes(cfgs: Sequence[Config]) -> list[int]:
  """The bytes that each trial takes at most, apart from samples; without the trials whose config is invalid.

  Only the highest rank of each method, model and choice of targets is planned; lower ranks take less in proportion.
  """
  largest: dict[tuple[str, ...], Config] = {}
  for cfg in cfgs:
    known = largest.setdefault(_kind(cfg), cfg)
    if cfg.lora.rank > known.lora.rank:
      largest[_kind(cfg)] = cfg
  sizes = {kind: _size_of_trial(cfg) for kind, cfg in largest.items()}
  found = []
  for cfg in cfgs:
    size = sizes[_kind(cfg)]
    if size is not None:
      uses_rank = methods.of(cfg.lora).uses_rank and cfg.lora.parameters is None
      share = cfg.lora.rank / largest[_kind(cfg)].lora.rank if uses_rank else 1.0
      found.append(OTHER_FILES + int(size * share))
  return found


def _kind(cfg: Config) -> tuple[str, ...]:
  lora = cfg.lora
  return tuple(map(repr, (cfg.model, cfg.optim.name, lora.method, lora.targets, lora.layers, lora.parameters,
                          lora.bias, lora.train_modules)))  # fmt: skip


def _size_of_trial(cfg: Config) -> int | None:
  """The bytes of checkpoints and trained weights; None if the config is invalid."""
  try:
    plan = make_plan(cfg)
  except InputError:
    return None
  return checkpoint_bytes(plan) * KEPT_CHECKPOINTS + _exported_bytes(plan)


def checkpoint_bytes(plan: Plan) -> int:
  """The bytes of one checkpoint: trained parameters and the moments of the optimizer, in float32."""
  optim = plan.cfg.optim
  moments = int(optim.momentum > 0) if optim.name == "sgd" else 2
  return 4 * int(plan.parameters()["trainable"]) * (1 + moments)


def _exported_bytes(plan: Plan) -> int:
  """The bytes of adapter/, or of model.safetensors with lora=full."""
  return 4 * int(plan.parameters()["trainable"])

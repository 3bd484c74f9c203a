"""Export of trained weights, and the check that the frozen base has not changed."""

from dataclasses import replace
from pathlib import Path

import jax

from lora_exp import lora
from lora_exp.config import LoraExpError
from lora_exp.lora import methods
from lora_exp.models.weights import store
from lora_exp.models.weights.locate import base_name
from lora_exp.runtime.host_arrays import on_host
from lora_exp.runtime.run_files import ADAPTER
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.job import Job
from lora_exp.train.plan import Plan


def frozen_digest(job: Job) -> str:
  """SHA-256 of every frozen array."""
  return store.digest(job.frozen)


def check_frozen(job: Job, expected: str) -> None:
  """Raises LoraExpError if training changed any byte of the base, which would be a bug."""
  if store.digest(job.frozen) != expected:
    raise LoraExpError("the frozen base changed during training; this is a bug in lora_exp; please report it")


def export_trained(run_dir: Path, plan: Plan, params: Tree, step: int, base_digest: str) -> lora.Adapter | None:
  """Writes the adapter in PEFT's format to adapter/ and returns it; with lora=full, writes model.safetensors.

  Returns None if there is no adapter. `params` holds one trial, (1, …).
  """
  cfg = plan.cfg
  method = methods.of(cfg.lora)
  if method.trains_everything:
    weights = jax.tree.map(lambda x: x[0], on_host(params))
    if jax.process_index() == 0:  # the files of other processes are not kept
      store.save(run_dir, weights)
  if not plan.table and not plan.full:
    return None
  metadata = {
    "family": cfg.model.family,
    "base": base_digest,
    "step": step,
    "scaling": cfg.lora.scaling,
    "quant": cfg.lora.quant,
  }
  adapter = take_trial(on_host(params), plan.table, plan.full, method.name, 0)
  adapter = replace(adapter, base=plan.start.base) if plan.start is not None else adapter
  base = base_name(cfg.model.weights) if cfg.model.base == "weights" and cfg.model.weights else None
  lora.save_adapter(run_dir / ADAPTER, adapter, plan.naming(), metadata, base=base, dropout=cfg.lora.dropout)
  return adapter

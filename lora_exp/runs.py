"""A run opened for use: what it trained beside its base; or a base alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp

from lora_exp import lora, weights
from lora_exp.base import make_base
from lora_exp.build import Plan, check_built, make_job
from lora_exp.config import Config, InputError, LoraConfig
from lora_exp.loop import Job
from lora_exp.lora.product import merge_kernel
from lora_exp.mesh import dotted, flatten
from lora_exp.step import Tree


@dataclass
class Opened:
  """A pack of one. `job` holds the base: its frozen arrays, and an adapter that changes nothing."""

  plan: Plan
  job: Job
  params: Tree  # what was trained, with the axis of arms; {} where that is in `frozen`, and for a base alone
  frozen: Tree  # every other array


def open_run(cfg: Config, with_base: bool = False) -> Opened:
  """The run in `cfg.run`, or without one the base of `cfg`.

  With lora=full the trained model is a base of its own; the one it began as is made only `with_base`.
  """
  method = cfg.lora.method if cfg.run else "frozen"
  directory = Path(str(cfg.run))
  _check_finished(directory, method)
  if method != "lora":
    cfg = replace(cfg, lora=LoraConfig(method="frozen"))
  plan = check_built(cfg)
  places = plan.layout.shardings(plan.base)
  trained = weights.load(directory / weights.FILE, plan.base, places) if method == "full" else None
  base = make_base(plan)[0] if with_base or trained is None else trained
  job = make_job(plan, base, 0)
  params = _adapter(directory, plan, job) if method == "lora" else job.state.params
  return Opened(plan, job, params, job.frozen if trained is None else trained)


def merged(run: Opened) -> Opened:
  """The run with A·B added to the kernels, and no adapter."""
  if not run.plan.table:
    return run
  scale = {row.path: run.job.arms.scale[0, i] for i, row in enumerate(run.plan.table)}

  def add(frozen: Mapping, params: Tree) -> Tree:
    adapters = flatten(params)

    def one(key_path, w):
      module, _, name = dotted(key_path).rpartition(".")
      if module not in scale or name not in ("kernel", "embedding"):
        return w
      a, b = adapters[f"{module}.lora_a"][0], adapters[f"{module}.lora_b"][0]
      return merge_kernel(w.reshape(a.shape[0], -1), a, b, scale[module]).reshape(w.shape)

    return jax.tree_util.tree_map_with_path(one, frozen)

  places = run.plan.layout.shardings(run.frozen)
  frozen = jax.jit(add, out_shardings=places)(run.frozen, run.params)
  plan = replace(run.plan, cfg=replace(run.plan.cfg, lora=LoraConfig(method="frozen")), table=[])
  job = make_job(plan, frozen, 0)
  return Opened(plan, job, job.state.params, job.frozen)


def _check_finished(directory: Path, method: str) -> None:
  """Raises InputError if the run has not left what it was to train: before a base is made for it."""
  left = {"lora": "adapter", "full": weights.FILE}.get(method)
  if left is not None and not (directory / left).exists():
    raise InputError(
      f"run={directory}: has no {left}, as the run did not end; go on with it: train.resume={directory}"
    )


def _adapter(directory: Path, plan: Plan, job: Job) -> Tree:
  """The adapter in `directory` as the params of `job`."""
  found = lora.load_adapter(directory / "adapter", plan.table)
  flat = {f"{path}.{name}": x for path, named in found.items() for name, x in named.items()}
  params = job.state.params
  leaves = [jnp.asarray(flat[name])[None] for name in flatten(params)]
  tree = jax.tree.unflatten(jax.tree.structure(params), leaves)
  return jax.device_put(tree, plan.layout.shardings(tree, arms=True))

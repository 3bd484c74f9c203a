"""Merging of a run's update into the kernels of its base, computed in float32 and rounded once."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_exp import lora
from lora_exp.config import Config, LoraConfig
from lora_exp.lora import methods
from lora_exp.lora.quantization import dense, is_quantised
from lora_exp.runtime.mesh import dotted, flatten
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.job import make_job
from lora_exp.train.loaded_run import LoadedRun, open_run
from lora_exp.train.plan import Plan

Array = Any


class Rounding(NamedTuple):
  """The effect of rounding on the update: sums over all merged elements, scalar float32 arrays.

  ΔW is the update in float32, and Δ the update in the rounded kernels.
  """

  product: Array = 0.0  # Σ ΔW·Δ
  update: Array = 0.0  # ‖ΔW‖²
  error: Array = 0.0  # ‖Δ − ΔW‖²

  def shares(self) -> dict[str, float | None]:
    """The share of ΔW in the rounded kernels and ‖Δ − ΔW‖ / ‖ΔW‖; None if the update is 0."""
    if not self.update:
      return {"update_kept": None, "update_error": None}
    return {"update_kept": float(self.product / self.update), "update_error": math.sqrt(self.error / self.update)}


@dataclass(frozen=True)
class MergedRun:
  """A run with the update merged into its kernels."""

  run: LoadedRun  # the merged model, as a base without an adapter
  rounding: Rounding
  before: Any = None  # the result of `measure` on the run before merging


def open_merged(
  cfg: Config,
  dtype: str | None = None,
  compute_dtype: str | None = None,
  measure: Callable[[LoadedRun], Any] | None = None,
) -> MergedRun:
  """Loads the run `cfg.run` and merges it.

  `dtype` is that of the merged arrays; with None, each array keeps its dtype. `compute_dtype` is the `dtype` of
  `open_run`. `measure` is called with the run before it is merged. Arrays are merged one at a time and those of the
  base are released, so that two models are never in memory.
  """
  run = open_run(cfg, dtype=compute_dtype)
  before = None if measure is None else measure(run)
  arrays, params, plan, method = _base_arrays(run.frozen), flatten(run.params), run.plan, run.job.program.method
  leaves = take_trial(run.params, plan.table, [], method, 0).leaves
  del run  # `arrays` holds the last references to the base
  frozen, rounding = _merge(plan, method, arrays, params, leaves, dtype)
  return MergedRun(_as_base(plan, frozen, dtype), rounding, before)


def merge(run: LoadedRun, dtype: str | None = None) -> tuple[LoadedRun, Rounding]:
  """Merges a loaded run. Returns the merged model as a base, and the rounding of its update.

  Both models are in memory while `run` is referenced.
  """
  leaves = take_trial(run.params, run.plan.table, [], run.job.program.method, 0).leaves
  arrays, params = _base_arrays(run.frozen), flatten(run.params)
  frozen, rounding = _merge(run.plan, run.job.program.method, arrays, params, leaves, dtype)
  return _as_base(run.plan, frozen, dtype), rounding


def _merge(plan: Plan, method: str, arrays: dict[str, Array], params: dict[str, Array],
           leaves: Mapping[str, methods.Leaves], dtype: str | None) -> tuple[Tree, Rounding]:
  """The frozen arrays of the merged model. Removes each array from `arrays` when it is merged."""
  table = {row.path: row for row in plan.table}
  shardings = flatten(plan.layout.shardings(plan.base))
  rounding = Rounding()
  merged = []
  paths, structure = jax.tree_util.tree_flatten_with_path(plan.base)
  with jax.default_matmul_precision("highest"):
    for key_path, abstract in paths:
      path = dotted(key_path)
      module, _, name = path.rpartition(".")
      target_dtype = jnp.dtype(dtype or abstract.dtype)
      if path in plan.full:
        base = arrays.pop(f"{module}.{lora.FROZEN_PREFIX}{name}")
        array, part = _rounded(base, params[path][0], target_dtype, shardings[path])
      elif module in table and name in ("kernel", "embedding"):
        scale = jnp.float32(table[module].scale)
        array, part = _merged_kernel(
          arrays.pop(path), leaves[module], scale, method, target_dtype, shardings[path]
        )
      else:
        merged.append(arrays.pop(path).astype(target_dtype))
        continue
      rounding = Rounding(*(a + b for a, b in zip(rounding, part, strict=True)))
      merged.append(array.block_until_ready())  # the base's array is released before the next is computed
  return jax.tree.unflatten(structure, merged), rounding


def _as_base(plan: Plan, frozen: Tree, dtype: str | None) -> LoadedRun:
  """A loaded run of a base with the arrays `frozen`, without an adapter."""
  model = replace(plan.cfg.model, param_dtype=dtype or plan.cfg.model.param_dtype)
  cfg = replace(plan.cfg, model=model, lora=LoraConfig(method="frozen"))
  plan = replace(plan, cfg=cfg, table=[], full=[], start=None)
  job = make_job(plan, frozen, 0)
  return LoadedRun(plan, job, job.state.params, job.frozen)


@partial(jax.jit, static_argnames=("method", "to", "sharding"))
def _merged_kernel(w: Any, leaves: methods.Leaves, scale: Array, method: str, to: Any,
                   sharding: Any) -> tuple[Array, Rounding]:
  """The adapted kernel of W (…, I, O), which may be quantised, in the dtype `to`, and its rounding."""
  w_f32 = dense(w, jnp.float32).astype(jnp.float32)
  return _rounded(w_f32, methods.get(method).adapted(w_f32, leaves, scale), to, sharding)


@partial(jax.jit, static_argnames=("to", "sharding"))
def _rounded(base: Array, exact: Array, to: Any, sharding: Any) -> tuple[Array, Rounding]:
  """Casts `exact` to the dtype `to`. Also returns the rounding of its difference from `base`."""
  array = jax.lax.with_sharding_constraint(exact.astype(to), sharding)
  update = exact.astype(jnp.float32) - base.astype(jnp.float32)
  rounded = array.astype(jnp.float32) - base.astype(to).astype(jnp.float32)
  return array, Rounding((update * rounded).sum(), (update**2).sum(), ((rounded - update) ** 2).sum())


def _base_arrays(frozen: Tree) -> dict[str, Array]:
  """The arrays of the base by dotted path; a quantised kernel counts as one array."""
  return {dotted(path): x for path, x in jax.tree_util.tree_leaves_with_path(frozen, is_leaf=is_quantised)}

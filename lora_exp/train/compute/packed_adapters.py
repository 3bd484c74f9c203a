"""The adapters of a pack: the initial leaves of each trial, and the model adapted for all trials at once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_exp import lora
from lora_exp.config import Config
from lora_exp.lora import methods
from lora_exp.lora.methods import Leaf, Leaves
from lora_exp.runtime import console
from lora_exp.runtime.dropout import stream_key
from lora_exp.runtime.mesh import dotted
from lora_exp.train.compute.trial_padding import Table, Tree, union

AdapterLeaves = Mapping[str, Leaves]  # module path -> the adapter's arrays by name


def initial_leaves(model: nnx.Module, cfg: Config, table: Table, base: Mapping[str, Any]) -> AdapterLeaves:
  """Initializes the adapter of one trial at the trial's own ranks, so that packing does not change its values.

  `base` maps the dotted path of every base parameter to its array, or to its abstract shape.
  """
  settings = cfg.lora
  kernels, fans = lora.kernels_of(model, table, base), lora.fans_of(model, table)
  key = stream_key(cfg.train.seed, "adapter")
  method = methods.of(settings)
  draw = partial(
    lora.draw,
    table,
    fans,
    kernels,
    key,
    method=settings.method,
    init=settings.init,
    std=settings.init_std,
    options=settings.options,
  )
  if method.init_of is None:
    return draw()
  with console.progress(f"{method.title}: decompose the base's kernels", len(table), "modules") as bar:
    return draw(done=bar.advance)


def inject_trials(
  model: nnx.Module,
  tables: Sequence[Table],
  method: str,
  leaves: Sequence[AdapterLeaves],
  full: Mapping[str, Sequence[Any]],
  compute: str,
) -> Tree:
  """Adapts `model` in place for the union of all trials.

  `leaves[n]` are the adapter's leaves of trial n. `full[path]` holds the value of one fully trained parameter for each
  trial. Returns the adapter arrays of all trials as nested dicts of stacked arrays (N, ...).
  """
  rows, declared = union(tables), methods.get(method).leaves
  shared = [_shared_leaves(method, trial_leaves) for trial_leaves in leaves]
  if any(shared):  # all modules use one shared array, and therefore one rank
    rows = [replace(row, rank=max(r.rank for r in rows)) for row in rows]
  stacked = {}
  for row in rows:
    module_leaves = [trial.get(row.path, defaults) for trial, defaults in zip(leaves, shared, strict=True)]
    stacked[row.path] = _stack(module_leaves, row, declared)
  first_trial = {path: {name: x[0] for name, x in arrays.items()} for path, arrays in stacked.items()}
  lora.attach_leaves(model, rows, method, first_trial, compute)
  lora.train_in_full(model, list(full))
  template = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.LoRAParam, lora.Constant)))

  def all_trials(key_path: tuple, leaf: jax.Array) -> jax.Array:
    """The values of one leaf for all trials (N, ...); zeros where the base is abstract."""
    path, _, name = dotted(key_path).rpartition(".")
    if path in stacked and name in stacked[path]:
      return stacked[path][name]
    values = full[f"{path}.{name}"]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in values):
      return jnp.zeros((len(values), *leaf.shape), jnp.float32)
    return jnp.stack([x.astype(jnp.float32) for x in values])

  return jax.tree_util.tree_map_with_path(all_trials, template)


def _shared_leaves(method: str, leaves: AdapterLeaves) -> dict[str, jax.Array]:
  """The arrays that all modules of one trial share (VeRA), which modules that the trial does not adapt need too."""
  arrays = next(iter(leaves.values()), {})
  return {name: arrays[name] for name in methods.get(method).shared_leaves if name in arrays}


def _stack(trials: Sequence[Leaves], row: lora.AdaptedModule, declared: Mapping[str, Leaf]) -> dict[str, jax.Array]:
  """Stacks one module's leaves over all trials, zero-padded to the largest; zeros for a trial that has none."""
  return {name: _stack_leaf(name, trials, row, declared[name].axes) for name in max(trials, key=len)}


def _stack_leaf(name: str, trials: Sequence[Leaves], row: lora.AdaptedModule, axes: str) -> jax.Array:
  """One leaf of all trials as an array (N, ...)."""
  by_trial = {n: np.asarray(leaves[name]) for n, leaves in enumerate(trials) if name in leaves}
  shape = np.max([x.shape for x in by_trial.values()], axis=0)
  if "R" in axes:
    shape[axes.index("R") - len(axes)] = row.rank
  stacked = np.zeros((len(trials), *shape), next(iter(by_trial.values())).dtype)
  for n, x in by_trial.items():
    stacked[n][tuple(slice(size) for size in x.shape)] = x
  return jnp.asarray(stacked)  # padded in numpy, as JAX would compile one program per shape

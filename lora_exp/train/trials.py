"""Hyperparameters: the points of a sweep that train in one program over one base. A single run is the pack of one.

Nothing that differs between trials is a Python constant of the step: scale, rates and decay are arrays with a leading
axis N. Ranks and targets need no masks: A is padded with zero columns and B with zero rows, and a module that a trial
does not target has scale 0; the gradients of the padding are exactly zero.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

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
from lora_exp.runtime.mesh import dotted, flatten

Table = list[lora.AdaptedModule]
AdapterLeaves = Mapping[str, Leaves]  # module path -> its adapter's arrays by name
Tree = Any  # nested dicts of arrays


class Hyperparameters(NamedTuple):
  """What differs between trials; a leading axis N, or one trial inside the mapped step."""

  lr: jax.Array  # peak learning rate
  weight_decay: jax.Array
  clip: jax.Array  # largest global norm of the gradient
  dropout: jax.Array  # rate on A's input
  steps: jax.Array  # length of the schedule: equal for all, an array so that another length compiles nothing anew
  lr_ratio: jax.Array  # B's learning rate over A's
  budget: jax.Array  # of AdaLoRA: ranks that a module keeps on average
  scale: jax.Array  # (N, modules): 0 where a trial does not target the module


def union(tables: Sequence[Table]) -> Table:
  """Every module that any trial adapts, at the largest of its ranks, in the order of first mention."""
  rows: dict[str, lora.AdaptedModule] = {}
  for row in (row for table in tables for row in table):
    best = rows.setdefault(row.path, row)
    rows[row.path] = replace(best, rank=max(best.rank, row.rank))
  return list(rows.values())


def make_trials(cfgs: Sequence[Config], tables: Sequence[Table], steps: int) -> Hyperparameters:
  """The numbers of every trial; `cfgs` and `tables` in the order of the trials, `steps` the length of the run."""
  paths = [row.path for row in union(tables)]
  scale = np.zeros((len(cfgs), len(paths)), np.float32)
  for n, table in enumerate(tables):
    for row in table:
      scale[n, paths.index(row.path)] = row.scale
  column = lambda get: jnp.array([get(c) for c in cfgs], jnp.float32)
  return Hyperparameters(
    lr=column(lambda c: c.optim.lr),
    weight_decay=column(lambda c: c.optim.weight_decay),
    clip=column(lambda c: np.inf if c.optim.clip is None else c.optim.clip),
    dropout=column(lambda c: c.lora.dropout),
    steps=column(lambda c: steps),
    lr_ratio=column(lambda c: c.lora.lr_ratio),
    budget=column(lambda c: c.lora.budget or 0),
    scale=jnp.asarray(scale),
  )


def first_leaves(model: nnx.Module, cfg: Config, table: Table, base: Mapping[str, Any]) -> AdapterLeaves:
  """What the adapters of one trial start as; `base` holds every parameter of the base (or its shape) by dotted path.

  A trial's A is drawn at its own rank, so that in a pack it starts as it would alone.
  """
  c = cfg.lora
  kernels, fans = lora.kernels_of(model, table, base), lora.fans_of(model, table)
  key = stream_key(cfg.train.seed, "adapter")
  method = methods.of(c)
  draw = partial(lora.draw, table, fans, kernels, key, method=c.method, init=c.init, std=c.init_std, options=c.options)
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
  """Adapts `model` for the union of the trials; returns what each trial has of its own, stacked, as nested dicts (N, …).

  `leaves[n]` are those of trial n; `full[path]` the values of a parameter trained in full, for each trial.
  """
  rows, declared = union(tables), methods.get(method).leaves
  shared = [_shared_leaves(method, trial) for trial in leaves]
  if any(shared):  # one for all modules, and so is its rank
    rows = [replace(row, rank=max(r.rank for r in rows)) for row in rows]
  stacked = {}
  for row in rows:
    trials = [trial.get(row.path, pair) for trial, pair in zip(leaves, shared, strict=True)]
    stacked[row.path] = _stack(trials, row, declared)
  first = {path: {name: x[0] for name, x in arrays.items()} for path, arrays in stacked.items()}
  lora.place(model, rows, method, first, compute)
  lora.train_in_full(model, list(full))
  own = nnx.to_pure_dict(nnx.state(model, nnx.Any(nnx.LoRAParam, lora.Constant)))

  def trials_of(key_path, leaf):
    path, _, name = dotted(key_path).rpartition(".")
    if path in stacked and name in stacked[path]:
      return stacked[path][name]
    values = full[f"{path}.{name}"]
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in values):
      return jnp.zeros((len(values), *leaf.shape), jnp.float32)
    return jnp.stack([x.astype(jnp.float32) for x in values])

  return jax.tree_util.tree_map_with_path(trials_of, own)


def _shared_leaves(method: str, leaves: AdapterLeaves) -> dict[str, jax.Array]:
  """What all modules of one trial share (VeRA's random pair), which a module that it does not adapt has as well."""
  arrays = next(iter(leaves.values()), {})
  return {name: arrays[name] for name in methods.get(method).shared_leaves if name in arrays}


def _stack(trials: Sequence[Leaves], row: lora.AdaptedModule, declared: Mapping[str, Leaf]) -> dict[str, jax.Array]:
  """The leaves of one module for all trials; zeros pad each to the largest, and stand for a trial without them."""

  def stacked(name: str) -> jax.Array:
    found = {n: np.asarray(own[name]) for n, own in enumerate(trials) if name in own}
    shape = np.max([x.shape for x in found.values()], axis=0)
    if "R" in (axes := declared[name].axes):
      shape[axes.index("R") - len(axes)] = row.rank
    whole = np.zeros((len(trials), *shape), next(iter(found.values())).dtype)
    for n, x in found.items():
      whole[n][tuple(slice(size) for size in x.shape)] = x
    return jnp.asarray(whole)  # not padded in jax, where each shape would be a program of its own

  return {name: stacked(name) for name in max(trials, key=len)}


def take_trial(params: Tree, table: Table, full: Sequence[str], method: str, trial: int) -> lora.Adapter:
  """One trial's adapter at its own ranks; its arrays stay where they are."""
  flat = {path: x[trial] for path, x in flatten(params).items()}
  declared = methods.get(method).leaves
  # A leaf that modules share stands in the tree once, at the first of them.
  named = {path.rpartition(".")[2]: x for path, x in flat.items()}
  shared = {name: named[name] for name in methods.get(method).shared_leaves if name in named}
  leaves = {}
  for row in table:
    arrays = {name: shared.get(name, flat.get(f"{row.path}.{name}")) for name in declared}
    leaves[row.path] = {name: _cut(x, row, declared[name].axes) for name, x in arrays.items() if x is not None}
  return lora.Adapter(method, tuple(table), leaves, {path: flat[path] for path in full})


def _cut(x: jax.Array, row: lora.AdaptedModule, axes: str) -> jax.Array:
  """A padded leaf (…, *axes) at the sizes of its row."""
  sizes = row.sizes()
  return x[(..., *(slice(sizes[axis]) for axis in axes))]


def solo_trial(
  named: Mapping[str, jax.Array], method: str, table: Table, pack_table: Table, trial: int
) -> dict[str, jax.Array]:
  """The arrays (1, …) of one trial's state, by dotted path, as a run of its own has them: its ranks, its modules alone.

  `named` are those of the pack, whose modules are `pack_table`; what has no axis of trials is passed on.
  """
  ranks, known = {row.path: row.rank for row in table}, {row.path for row in pack_table}
  declared = methods.get(method).leaves
  found = {}
  for name, x in named.items():
    if x.ndim == 0:
      found[name] = x
      continue
    path, leaf = _module(name, known, declared)
    if path is not None and path not in ranks:
      continue
    array = x[trial : trial + 1]
    if path is not None and "R" in (axes := declared[leaf].axes):
      axis = array.ndim - len(axes) + axes.index("R")
      array = array[(*[slice(None)] * axis, slice(ranks[path]))]
    found[name] = array
  return found


def padded_trial(named: Mapping[str, jax.Array], pack: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The inverse of `solo_trial` for one trial: (1, …) in the shapes of the pack's arrays, zeros where it has nothing."""
  padded = {}
  for name, like in pack.items():
    shape = like.shape if like.ndim == 0 else (1, *like.shape[1:])
    x = named.get(name)
    if x is None:
      padded[name] = jnp.zeros(shape, like.dtype)
    elif x.shape == shape:
      padded[name] = x
    else:
      padded[name] = jnp.pad(x, [(0, b - a) for a, b in zip(x.shape, shape, strict=True)])
  return padded


def _module(name: str, known: Collection[str], declared: Mapping[str, Leaf]) -> tuple[str | None, str]:
  """(adapted module, leaf) that a dotted path of the state ends with; (None, leaf) for any other array."""
  *segments, leaf = name.split(".")
  if leaf not in declared:
    return None, leaf
  ends = (".".join(segments[i:]) for i in range(len(segments)))
  return next((end for end in ends if end in known), None), leaf

"""Arms: the points of a sweep that train in one program over one base. A single run is the pack of one.

Nothing that differs between arms is a Python constant of the step: scale, rates and decay are arrays with a leading
axis N. Ranks and targets need no masks: A is padded with zero columns and B with zero rows, and a module that an arm
does not target has scale 0; the gradients of the padding are exactly zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_exp import lora
from lora_exp.config import Config
from lora_exp.dropout import stream_key

Table = list[lora.Adapted]


class Arms(NamedTuple):
  """What differs between arms; a leading axis N, or one arm inside the mapped step."""

  lr: jax.Array  # peak learning rate
  weight_decay: jax.Array
  clip: jax.Array  # largest global norm of the gradient
  dropout: jax.Array  # rate on A's input
  steps: jax.Array  # length of the schedule: equal for all, an array so that another length compiles nothing anew
  scale: jax.Array  # (N, modules): 0 where an arm does not target the module


def table_of(model: nnx.Module, cfg: Config, presets: Mapping[str, Sequence[str]]) -> Table:
  """The modules that `cfg` adapts on `model`; empty for lora=full and lora=frozen."""
  c = cfg.lora
  if c.method != "lora":
    return []
  return lora.resolve(
    model,
    c.targets,
    rank=c.rank,
    alpha=c.alpha,
    scaling=c.scaling,
    exclude=c.exclude,
    layers_=c.layers,
    rank_pattern=c.rank_pattern,
    alpha_pattern=c.alpha_pattern,
    presets=presets,
  )


def union(tables: Sequence[Table]) -> Table:
  """Every module that any arm adapts, at the largest of its ranks, in the order of first mention."""
  rows: dict[str, lora.Adapted] = {}
  for row in (row for table in tables for row in table):
    best = rows.setdefault(row.path, row)
    rows[row.path] = replace(best, rank=max(best.rank, row.rank))
  return list(rows.values())


def make_arms(cfgs: Sequence[Config], tables: Sequence[Table], steps: int) -> Arms:
  """The numbers of every arm; `cfgs` and `tables` in the order of the arms, `steps` the length of the run."""
  paths = [row.path for row in union(tables)]
  scale = np.zeros((len(cfgs), len(paths)), np.float32)
  for n, table in enumerate(tables):
    for row in table:
      scale[n, paths.index(row.path)] = row.scale
  column = lambda get: jnp.array([get(c) for c in cfgs], jnp.float32)
  return Arms(
    lr=column(lambda c: c.optim.lr),
    weight_decay=column(lambda c: c.optim.weight_decay),
    clip=column(lambda c: np.inf if c.optim.clip is None else c.optim.clip),
    dropout=column(lambda c: c.lora.dropout),
    steps=column(lambda c: steps),
    scale=jnp.asarray(scale),
  )


def inject_arms(model: nnx.Module, cfgs: Sequence[Config], tables: Sequence[Table], compute: str) -> dict:
  """Adapts `model` for the union of the arms; returns A and B of every arm, stacked, as nested dicts (N, …).

  Each arm's A is drawn at its own rank, so it starts as it would alone.
  """
  rows = union(tables)
  drawn = [
    lora.draw(model, table, stream_key(c.train.seed, "adapter"), c.lora.init, c.lora.init_std)
    for c, table in zip(cfgs, tables, strict=True)
  ]
  stacked = {row.path: jnp.stack([_padded(a.get(row.path), row) for a in drawn]) for row in rows}
  lora.place(model, rows, {path: a[0] for path, a in stacked.items()}, compute)
  known = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
  return jax.tree_util.tree_map_with_path(lambda p, x: _arm_leaf(p, x, stacked, len(cfgs)), known)


def _padded(a_IR: jax.Array | None, row: lora.Adapted) -> jax.Array:
  """A with zero columns up to the row's rank; all zeros for an arm that does not target the module."""
  if a_IR is None:
    return jnp.zeros((row.fan_in, row.rank))
  return jnp.pad(a_IR, [(0, 0), (0, row.rank - a_IR.shape[1])])


def _arm_leaf(key_path, leaf: jax.Array, a: Mapping[str, jax.Array], arms: int) -> jax.Array:
  *module, name = [str(k.key) for k in key_path]
  return a[".".join(module)] if name == "lora_a" else jnp.zeros((arms, *leaf.shape), leaf.dtype)


def take_arm(params: Mapping, table: Table, arm: int) -> dict[str, dict[str, np.ndarray]]:
  """One arm's adapter at its own ranks: {path: {lora_a (I, R), lora_b (R, O)}}."""
  weights = {}
  for row in table:
    node = params
    for name in row.path.split("."):
      node = node[int(name) if name.isdigit() else name]
    a, b = np.asarray(node["lora_a"][arm]), np.asarray(node["lora_b"][arm])
    weights[row.path] = {"lora_a": a[:, : row.rank], "lora_b": b[: row.rank]}
  return weights

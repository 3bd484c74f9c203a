"""Conversion between one trial's arrays and the padded arrays of a pack.

Padding needs no masks. A is padded with zero columns and B with zero rows, and a module that a trial does not adapt has
scale 0. The gradients of the padding are exactly zero, so the padding of the optimizer state stays zero too.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp import lora
from lora_exp.lora import methods
from lora_exp.lora.methods import Leaf
from lora_exp.runtime.mesh import flatten

Table = list[lora.AdaptedModule]
Tree = Any  # nested dicts of arrays


def union(tables: Sequence[Table]) -> Table:
  """The modules that any trial adapts, each at the largest of its ranks, in order of first appearance."""
  rows: dict[str, lora.AdaptedModule] = {}
  for table in tables:
    for row in table:
      largest = rows.setdefault(row.path, row)
      rows[row.path] = replace(largest, rank=max(largest.rank, row.rank))
  return list(rows.values())


def take_trial(params: Tree, table: Table, full: Sequence[str], method: str, trial: int) -> lora.Adapter:
  """Extracts the adapter of one trial at its own ranks.

  The leaves of `params` have a leading axis N of trials. `table` is the trial's; `full` are the paths of the parameters
  that are trained in full. The arrays stay on their devices.
  """
  flat = {path: x[trial] for path, x in flatten(params).items()}
  kind = methods.get(method)
  declared = kind.leaves
  # The tree holds a shared leaf once, at the first module that uses it.
  by_name = {path.rpartition(".")[2]: x for path, x in flat.items()}
  shared = {name: by_name[name] for name in kind.shared_leaves if name in by_name}
  leaves = {}
  for row in table:
    sizes = kind.sizes(row)
    arrays = {name: shared.get(name, flat.get(f"{row.path}.{name}")) for name in declared}
    leaves[row.path] = {name: _unpad(x, sizes, declared[name].axes) for name, x in arrays.items() if x is not None}
  return lora.Adapter(method, tuple(table), leaves, {path: flat[path] for path in full})


def _unpad(x: jax.Array, sizes: Mapping[str, int], axes: str) -> jax.Array:
  """Cuts a padded leaf (..., *axes) to the sizes of its module."""
  return x[(..., *(slice(sizes[axis]) for axis in axes))]


def solo_trial(
  arrays: Mapping[str, jax.Array], method: str, table: Table, pack_table: Table, trial: int
) -> dict[str, jax.Array]:
  """Extracts one trial's state (1, ...), as a single run of the trial would hold it.

  `arrays` maps dotted paths to the pack's arrays. The result has only the trial's modules, at the trial's ranks.
  Scalars have no axis of trials and are copied.
  """
  ranks, pack_paths = {row.path: row.rank for row in table}, {row.path for row in pack_table}
  declared = methods.get(method).leaves
  solo = {}
  for name, x in arrays.items():
    if x.ndim == 0:
      solo[name] = x
      continue
    path, leaf = _split_module(name, pack_paths, declared)
    if path is not None and path not in ranks:
      continue
    array = x[trial : trial + 1]
    if path is not None and "R" in declared[leaf].axes:
      axes = declared[leaf].axes
      rank_axis = array.ndim - len(axes) + axes.index("R")
      array = array[(*[slice(None)] * rank_axis, slice(ranks[path]))]
    solo[name] = array
  return solo


def padded_trial(arrays: Mapping[str, jax.Array], pack: Mapping[str, Any]) -> dict[str, jax.Array]:
  """The inverse of `solo_trial`: pads one trial's arrays (1, ...) with zeros to the shapes of the pack's.

  An array of `pack` that the trial does not have becomes zeros.
  """
  padded = {}
  for name, template in pack.items():
    shape = template.shape if template.ndim == 0 else (1, *template.shape[1:])
    x = arrays.get(name)
    if x is None:
      padded[name] = jnp.zeros(shape, template.dtype)
    elif x.shape == shape:
      padded[name] = x
    else:
      padded[name] = jnp.pad(x, [(0, target - size) for size, target in zip(x.shape, shape, strict=True)])
  return padded


def _split_module(name: str, modules: Collection[str], declared: Mapping[str, Leaf]) -> tuple[str | None, str]:
  """(adapted module, leaf) that the dotted path `name` ends with; (None, leaf) for any other array."""
  *segments, leaf = name.split(".")
  if leaf not in declared:
    return None, leaf
  suffixes = (".".join(segments[i:]) for i in range(len(segments)))
  return next((suffix for suffix in suffixes if suffix in modules), None), leaf

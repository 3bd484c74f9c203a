"""Small arrays joined into larger ones, so that an optimizer updates a few arrays instead of hundreds.

An adapter on every linear layer of a deep model has hundreds of small matrices. If each is updated by itself, most of
the operations in a training step belong to the optimizer, and so does most of the time that XLA needs to compile it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

Tree = Any  # nested dicts of arrays
LARGEST = 2**16  # elements of an array that is joined with others; joining larger ones takes memory and gains little


@dataclass(frozen=True)
class LeafGroups:
  """The leaves of a tree in groups, each of which is joined along its first axis.

  The leaves of a group have the same name, dtype and shape apart from the first axis, so that an optimizer treats all
  values of the joined array alike. Leaves that have no group stay as they are.
  """

  template: Tree  # nested dicts, whose leaves have shapes and dtypes
  groups: dict[tuple[str, ...], list[tuple[str, ...]]]  # (group, leaf name) -> the paths of its leaves

  def join(self, tree: Tree) -> Tree:
    """`tree`, which has the structure of the template, with each group as one array."""
    flat = traverse_util.flatten_dict(tree)
    joined = {group: jnp.concatenate([flat.pop(path) for path in paths]) for group, paths in self.groups.items()}
    return traverse_util.unflatten_dict(flat | joined)

  def split(self, joined: Tree) -> Tree:
    """The inverse of `join`."""
    flat = traverse_util.flatten_dict(joined)
    template = traverse_util.flatten_dict(self.template)
    for group, paths in self.groups.items():
      array, start = flat.pop(group), 0
      for path in paths:
        end = start + template[path].shape[0]
        flat[path] = jax.lax.slice_in_dim(array, start, end)
        start = end
    return traverse_util.unflatten_dict({path: flat[path] for path in template})

  def join_state(self, opt: Tree) -> Tree:
    """The state of an optimizer, in which every tree like the template is joined."""
    return _map_subtrees(self.join, self.template, opt)

  def split_state(self, joined: Tree) -> Tree:
    """The inverse of `join_state`."""
    return _map_subtrees(self.split, jax.eval_shape(self.join, self.template), joined)


def group_leaves(tree: Tree) -> LeafGroups:
  """The groups of the small leaves of `tree` (nested dicts); those with a single leaf are left out."""
  groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
  for path, x in traverse_util.flatten_dict(tree).items():
    if x.ndim and x.size <= LARGEST:
      sizes = "×".join(map(str, ("rows", *x.shape[1:])))
      groups.setdefault((f"{sizes} {x.dtype}", path[-1]), []).append(path)
  return LeafGroups(tree, {group: paths for group, paths in groups.items() if len(paths) > 1})


def _map_subtrees(function: Callable[[Tree], Tree], template: Tree, tree: Tree) -> Tree:
  """`tree` with `function` applied to every subtree that has the structure of `template`."""
  structure: Any = jax.tree.structure(template)

  def is_like(x: Any) -> bool:
    return jax.tree.structure(x) == structure

  def mapped(x: Any) -> Any:
    return function(x) if is_like(x) else x

  return jax.tree.map(mapped, tree, is_leaf=is_like)

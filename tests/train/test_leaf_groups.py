"""Small leaves are joined for the optimizer, and its results are those of single leaves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_exp.train.compute.leaf_groups import LARGEST, group_leaves
from lora_exp.train.compute.optimizer import clip


def adapter() -> dict:
  """An adapter of three modules with two widths, a vector, and a matrix that is too large to be joined."""
  rng = np.random.default_rng(0)
  sizes = {"up": (6, 12), "gate": (6, 12), "down": (12, 6)}
  tree = {}
  for name, (inputs, outputs) in sizes.items():
    tree[name] = {"lora_a": rng.normal(size=(inputs, 2)), "lora_b": rng.normal(size=(2, outputs))}
  tree["down"]["bias"] = rng.normal(size=6)
  tree["head"] = {"lora_a": rng.normal(size=(LARGEST // 2 + 1, 2))}
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def test_leaves_of_equal_name_and_width_are_joined():
  tree = adapter()
  groups = group_leaves(tree)
  joined = groups.join(tree)
  shapes = sorted((x.shape for x in jax.tree.leaves(joined)), key=str)
  # A of three modules; B of `up` and `gate`; those of `down`, its bias and the head are left as they are.
  assert shapes == sorted([(24, 2), (4, 12), (2, 6), (6,), (LARGEST // 2 + 1, 2)], key=str)
  jax.tree.map(np.testing.assert_array_equal, groups.split(joined), tree)
  assert jax.tree.structure(groups.split(joined)) == jax.tree.structure(tree)


@pytest.mark.parametrize("rule", [optax.adamw(1e-2, weight_decay=0.1), optax.sgd(1e-2, momentum=0.9)])
def test_an_optimizer_gives_joined_leaves_the_same_update(rule):
  tree, groups = adapter(), group_leaves(adapter())
  grads = jax.tree.map(jnp.sin, tree)
  state = rule.init(tree)
  updates, new_state = rule.update(grads, state, tree)
  joined_updates, joined_state = rule.update(groups.join(grads), groups.join_state(state), groups.join(tree))
  jax.tree.map(np.testing.assert_array_equal, groups.split(joined_updates), updates)
  jax.tree.map(np.testing.assert_array_equal, groups.split_state(joined_state), new_state)


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_by_a_known_norm_is_that_of_optax(largest):
  grads, groups = adapter(), group_leaves(adapter())
  expected, _ = optax.clip_by_global_norm(largest).update(grads, optax.EmptyState())
  by_norm = clip(optax.tree.norm(grads), jnp.float32(largest))
  joined, _ = by_norm.update(groups.join(grads), by_norm.init(grads))
  jax.tree.map(np.testing.assert_array_equal, groups.split(joined), expected)

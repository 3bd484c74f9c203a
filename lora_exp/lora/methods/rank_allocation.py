"""Allocation of a rank budget among modules during training: AdaLoRA (arXiv 2303.10512), as an optax transformation.

The update is s·A·diag(e)·B. Training starts with more ranks than the budget. Every few steps the ranks of all modules
are compared, and e is set to zero for the least important ones, more of them each time. A pruned rank continues to
train and may recover at the next pruning; in the last part of the run the selection is final.

Details that the paper leaves open follow PEFT 0.21. In eq. 8, w is the weight after the optimizer's step, and the
gradient includes that of the regularizer. The averages stop before the last pruning. The numerator of eq. 12 is
t − t_i. The regularizer is the mean of the norms, not the sum of squared norms of eq. 4. The only difference is in
ties: PEFT prunes every rank that equals the threshold; here exactly the budget remains.

Padded ranks (zero columns of A and zero rows of B) are ignored: they are not counted and never change.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_exp.config import InputError

Array = Any
Tree = Any  # nested dicts of arrays
AdapterLeaves = dict[tuple, dict[str, Array]]  # key path of a module -> the leaves of its adapter
LEAVES = ("lora_a", "lora_b", "lora_e")  # (…, I, R), (…, R, O) and (…, R)


class AllocateState(NamedTuple):
  """State of `allocate`. The trees have the keys of the params, for the leaves of adapters only."""

  count: Array  # int32, number of steps taken
  inner: Any  # state of the wrapped transformation
  sensitivity: Tree  # I̅ of every weight, float32
  uncertainty: Tree  # U̅ of every weight, float32
  mask: Tree  # bool for each value of e: whether it survived the last pruning


def allocate(
  inner: optax.GradientTransformation,
  *,
  steps: Array,
  budget: Array,
  orthogonal: Array = 0.5,
  beta1: float = 0.85,
  beta2: float = 0.85,
  every: int = 10,
  begin: float = 0.1,
  end: float = 0.3,
) -> optax.GradientTransformation:
  """Wraps `inner` in the rank allocation of AdaLoRA, for one trial (arXiv 2303.10512, Algorithm 1).

  Parameters that are not leaves of an adapter get the update of `inner` unchanged.

  Args:
    inner: the optimizer.
    steps: length of the run; may be traced.
    budget: average rank per module at the end: round(budget·modules) values of e remain; may be traced.
    orthogonal: γ, the weight of `orthogonality`, whose gradient is added before `inner`; may be traced.
    beta1: decay of the sensitivity average (eq. 9).
    beta2: decay of the uncertainty average (eq. 10).
    every: ΔT, steps between two prunings.
    begin: fraction of the steps before the first pruning (t_i).
    end: fraction of the steps after the last pruning (t_f), in which pruned values stay zero.

  Raises:
    InputError: if a fraction, the interval or a decay is out of range, or `init` gets params without any `lora_e`.
  """
  _check(every, begin, end, beta1, beta2)

  def update(grads: Tree, state: AllocateState, params: Tree | None = None) -> tuple[Tree, AllocateState]:
    if params is None:
      raise ValueError("allocate needs the params: update(grads, state, params)")
    modules = adapters(params)
    regularizer_grads = jax.grad(_weighted_orthogonality)(modules, orthogonal)
    grads = replaced(grads, jax.tree.map(jnp.add, adapters(grads), regularizer_grads))
    updates, inner_state = inner.update(grads, state.inner, params)

    step = state.count + 1
    first, last = jnp.round(begin * steps), steps - jnp.round(end * steps)
    running = step < last
    sensitivity = jax.tree.map(_sensitivity, modules, adapters(updates), adapters(grads))
    # A beta of 1 leaves an average unchanged, bit for bit.
    means, spreads = averages(
      sensitivity,
      adapters(state.sensitivity),
      adapters(state.uncertainty),
      jnp.where(running, beta1, 1),
      jnp.where(running, beta2, 1),
    )

    prune = ((first < step) & running & (step % every == 0)) | (step == last)
    chosen = choose(importance(means, spreads), real_ranks(modules), budget, step, first, last)
    mask, e_updates = _prune(adapters(state.mask), chosen, modules, adapters(updates), prune, prune | (step > last))
    trees = [replaced({}, tree) for tree in (means, spreads, mask)]
    return replaced(updates, e_updates), AllocateState(step, inner_state, *trees)

  return optax.GradientTransformation(partial(_init_state, inner), update)


def _init_state(inner: optax.GradientTransformation, params: Tree) -> AllocateState:
  """The state before the first step. Raises InputError if no module of `params` has `lora_e`."""
  modules = adapters(params)
  if not modules:
    raise InputError("AdaLoRA finds no ranks to allocate: no module has lora_e; set lora.method=adalora")
  mask = {path: {"lora_e": real} for path, real in real_ranks(modules).items()}
  sensitivity, uncertainty = replaced({}, _zeros(modules)), replaced({}, _zeros(modules))
  return AllocateState(jnp.int32(0), inner.init(params), sensitivity, uncertainty, replaced({}, mask))


def _zeros(modules: AdapterLeaves) -> AdapterLeaves:
  """Float32 zeros in the shapes of all leaves."""
  return optax.tree.zeros_like(modules, dtype=jnp.float32)


def _weighted_orthogonality(modules: AdapterLeaves, weight: Array) -> Array:
  """γ times the regularizer."""
  return jnp.float32(weight) * orthogonality(modules)


def _sensitivity(weight: Array, update: Array, grad: Array) -> Array:
  """I = |w·∇w| (eq. 8), with the weight after the step."""
  return jnp.abs((weight + update) * grad)


def _prune(
  masks: AdapterLeaves,
  chosen: Mapping[tuple, Array],
  modules: AdapterLeaves,
  updates: AdapterLeaves,
  prune: Array,
  apply_mask: Array,
) -> tuple[AdapterLeaves, AdapterLeaves]:
  """Returns the masks and the updates of e after this step.

  If `prune`, the masks become `chosen`. If `apply_mask`, the update of a pruned value is −e, which makes it zero.
  """
  new_masks, e_updates = {}, {}
  for path, mask in masks.items():
    keep = jnp.where(prune, chosen[path], mask["lora_e"])
    e, u = modules[path]["lora_e"], updates[path]["lora_e"]
    new_masks[path] = {"lora_e": keep}
    e_updates[path] = {"lora_e": jnp.where(keep | ~apply_mask, u, -e)}
  return new_masks, e_updates


def kept_ranks(params: Tree) -> dict[str, int]:
  """Returns the number of nonzero values of e in each adapted module, by dotted path; `params` are of one trial."""
  return {".".join(map(str, path)): int((leaves["lora_e"] != 0).sum()) for path, leaves in adapters(params).items()}


def adapters(tree: Tree) -> AdapterLeaves:
  """Returns the leaves of every adapter in `tree`, by module, in the order in which JAX flattens the tree."""
  flat = flatten_dict(tree)
  paths = sorted(path[:-1] for path in flat if path[-1] == "lora_e")
  return {path: {name: flat[*path, name] for name in LEAVES if (*path, name) in flat} for path in paths}


def replaced(tree: Tree, modules: AdapterLeaves) -> Tree:
  """Returns `tree` with the leaves of `modules` replaced."""
  flat = flatten_dict(tree, keep_empty_nodes=True)
  flat |= {(*path, name): leaf for path, leaves in modules.items() for name, leaf in leaves.items()}
  return unflatten_dict(flat)


def real_ranks(modules: AdapterLeaves) -> dict[tuple, Array]:
  """Returns for each module which ranks (…, R) are not padding."""
  return {path: (m["lora_a"] != 0).any(-2) | (m["lora_b"] != 0).any(-1) for path, m in modules.items()}


def orthogonality(modules: AdapterLeaves) -> Array:
  """Returns the mean of ‖AᵀA − I‖ and ‖BBᵀ − I‖ (Frobenius) over all modules: PEFT's version of eq. 4.

  The identity has ones only for ranks that are not padding.
  """
  norms, real = [], real_ranks(modules)
  for path, exists in real.items():
    identity = jnp.eye(exists.shape[-1]) * exists[..., None, :]
    for factor in (modules[path]["lora_a"], jnp.swapaxes(modules[path]["lora_b"], -1, -2)):
      squared = jnp.square(jnp.swapaxes(factor, -1, -2) @ factor - identity).sum((-1, -2))
      # The square root has no gradient at zero, which occurs for padding and for orthonormal columns.
      norms.append(jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0))
  return joined(norms).sum() / jnp.maximum(2 * joined(x.any(-1) for x in real.values()).sum(), 1)


def joined(arrays: Iterable[Array]) -> Array:
  """Returns all values as one vector. (A sum of separate terms would make compilation take quadratic time.)"""
  return jnp.concatenate([jnp.ravel(x) for x in arrays])


def averages(
  sensitivity: AdapterLeaves, means: AdapterLeaves, spreads: AdapterLeaves, beta1: Array, beta2: Array
) -> tuple[AdapterLeaves, AdapterLeaves]:
  """Returns the running averages I̅ (eq. 9) and U̅ (eq. 10), updated with the sensitivity I of this step."""

  def update_mean(mean: Array, new: Array) -> Array:
    """Eq. 9."""
    return beta1 * mean + (1 - beta1) * new

  def update_spread(spread: Array, new: Array, mean: Array) -> Array:
    """Eq. 10."""
    return beta2 * spread + (1 - beta2) * jnp.abs(new - mean)

  means = jax.tree.map(update_mean, means, sensitivity)
  return means, jax.tree.map(update_spread, spreads, sensitivity, means)


def importance(means: AdapterLeaves, spreads: AdapterLeaves) -> dict[tuple, Array]:
  """Returns the importance of each rank (…, R): s = I̅·U̅ (eq. 11) of e plus the means over A and over B (eq. 7)."""
  s = jax.tree.map(jnp.multiply, means, spreads)
  return {path: m["lora_e"] + m["lora_a"].mean(-2) + m["lora_b"].mean(-1) for path, m in s.items()}


def budget_at(step: Array, first: Array, last: Array, total: Array, target: Array) -> Array:
  """Returns the number of ranks that a pruning at `step` leaves (eq. 12).

  It is `total` up to the step `first`, falls cubically, and is `target` from the step `last` on.
  """
  left = jnp.clip((last - step) / jnp.maximum(last - first, 1), 0, 1)
  # Rounded down as in PEFT. The margin covers integers that float32 arithmetic puts slightly too low.
  return jnp.floor(target + (total - target) * left**3 + 1e-3)


def choose(
  scores: Mapping[tuple, Array], real: Mapping[tuple, Array], budget: Array, step: Array, first: Array, last: Array
) -> dict[tuple, Array]:
  """Returns for each module which ranks (…, R) a pruning at `step` leaves: those with the highest scores overall.

  Of equal scores, the first ones win.
  """
  exists = joined(real.values())
  total, modules = exists.sum(), joined(x.any(-1) for x in real.values()).sum()
  target = jnp.clip(jnp.round(budget * modules), 0, total)
  order = jnp.argsort(jnp.where(exists, joined(scores.values()), -jnp.inf), descending=True, stable=True)
  keep = jnp.argsort(order) < budget_at(step, first, last, total, target)
  chosen, start = {}, 0
  for path, x in real.items():
    chosen[path] = keep[start : start + x.size].reshape(x.shape)
    start += x.size
  return chosen


def _check(every: int, begin: float, end: float, beta1: float, beta2: float) -> None:
  """Raises InputError for values of `allocate` that are out of range."""
  problems = []
  if every < 1:
    problems.append(f"AdaLoRA's every={every}: the number of steps between prunings must be at least 1")
  if begin < 0 or end < 0 or begin + end >= 1:
    problems.append(
      f"AdaLoRA's begin={begin} and end={end}: these fractions of the steps must not be negative, and their sum must "
      "be below 1"
    )
  for name, beta in (("beta1", beta1), ("beta2", beta2)):
    if not 0 < beta < 1:
      problems.append(f"AdaLoRA's {name}={beta}: must be between 0 and 1")
  if problems:
    raise InputError(problems)

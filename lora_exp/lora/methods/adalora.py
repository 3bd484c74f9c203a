"""AdaLoRA: a run spends its ranks on the modules where they matter (arXiv 2303.10512), as one optax transformation.

An adapter's update is s·A·diag(e)·B. A run starts with more ranks than it may keep; every few steps the ranks of all
modules are compared and e becomes zero in those that matter least, more of them each time. A pruned rank trains on
until the next pruning and may come back; in the last part of the run the choice stands.

What the paper leaves open is done as in PEFT 0.21, number for number: w in eq. 8 is the weight after the optimizer's
step, and its gradient has the regulariser in it; the averages stop before the last pruning; the numerator of eq. 12
is t − t_i. The regulariser is PEFT's too: not eq. 4's sum of squared norms, but the mean of the norms. Only ties
differ: PEFT prunes every rank that equals the threshold, here exactly the budget survives.

Padded ranks (a column of A and a row of B that are zero) do not exist: they count nowhere and never move.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_exp.config import InputError, LoraConfig
from lora_exp.lora.methods.base import Array, Factors, InitSettings, Leaf, Leaves, Modules
from lora_exp.lora.methods.lora import LoRA
from lora_exp.runtime.dropout import path_key

STD = 0.02  # of A and B at the start (section 3.1 of the paper), as in PEFT
Tree = Any  # nested dicts of arrays
AdapterLeaves = dict[tuple, dict[str, Array]]  # by the path of a module's dict in a tree: the leaves of its adapter
LEAVES = ("lora_a", "lora_b", "lora_e")  # (…, I, R), (…, R, O) and (…, R)


class AdaLoRA(LoRA):
  """ΔW = s·A·diag(e)·B; the ranks that matter least lose their e."""

  name = "adalora"
  title = "AdaLoRA"
  paper = "2303.10512"
  cost = "R·(I + O + 1) parameters, and two running averages of each beside the optimizer's"
  leaves = LoRA.leaves | {"lora_e": Leaf("R")}
  uses_budget = True
  peft = None

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """A and B are drawn from N(0, STD²), e is zero; lora.init has no say."""
    started = super().init_all(modules, key, InitSettings("normal", STD), done)
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      shape = self.shape("lora_b", kernel, row)
      b = STD * jax.random.normal(jax.random.fold_in(path_key(key, row.path), 1), shape)
      started[row.path] |= {"lora_b": b, "lora_e": jnp.zeros(self.shape("lora_e", kernel, row))}
    return started

  def factors(self, leaves: Leaves) -> Factors:
    """A·diag(e) and B."""
    return leaves["lora_a"] * leaves["lora_e"][..., None, :], leaves["lora_b"]

  def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Array]:
    """e folded into A, without the columns whose e is 0; one of them stays where the module is `needed`."""
    a, b, e = leaves["lora_a"], leaves["lora_b"], leaves["lora_e"]
    kept = (e != 0).reshape(-1, a.shape[-1]).any(axis=0)
    kept[0] |= needed and not kept.any()
    return {"lora_a": (a * e[..., None, :])[..., kept], "lora_b": b[..., kept, :]}

  def wrap_optimizer(self, rule: optax.GradientTransformation, trial: Any) -> optax.GradientTransformation:
    """With the allocation of ranks around it."""
    return allocate(rule, steps=trial.steps, budget=trial.budget)

  def summary(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """The ranks that are left in each module."""
    return {"kept_ranks": {path: int(np.count_nonzero(x["lora_e"])) for path, x in leaves.items()}} if leaves else {}

  def check(self, config: LoraConfig) -> list[str]:
    """The budget is at most the rank, and is what chooses the ranks."""
    problems = []
    if config.budget is None:
      problems.append("lora.budget=null: AdaLoRA needs the ranks that a module keeps on average, as lora.budget=8")
    elif config.budget > config.rank:
      problems.append(
        f"lora.budget={config.budget:g}: must be at most lora.rank={config.rank}, which AdaLoRA starts from"
      )
    if config.parameters is not None:
      problems.append(
        f"lora.parameters={config.parameters:g}: AdaLoRA chooses ranks itself, lora.budget on average; remove one of "
        "them"
      )
    return problems


class AllocateState(NamedTuple):
  """What is remembered between steps; the trees have params' own keys, those of the adapters' leaves alone."""

  count: Array  # int32, steps taken
  inner: Any
  sensitivity: Tree  # I̅ of every weight, float32
  uncertainty: Tree  # U̅ of every weight, float32
  mask: Tree  # bool for each value of e: what the last pruning kept


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
  """`inner`, and then AdaLoRA's choice of the ranks of one trial (arXiv 2303.10512, Algorithm 1).

  `steps`: length of the run. `budget`: ranks that a module keeps on average: round(budget·modules) values of e in all
  are left at the end, from all of them at the start. In the share `begin` of the steps (t_i) nothing is pruned; then
  every `every` steps (ΔT), on a cubic schedule; in the share `end` (t_f) pruned values stay zero. `orthogonal` (γ):
  weight of `orthogonality` in the loss; its gradient is added before `inner`. `beta1`, `beta2`: of the averages.
  `steps`, `budget` and `orthogonal` may be traced. Leaves that are no adapter's get `inner`'s update as it is.

  Raises InputError for shares, an interval or betas out of range, and on params without any `lora_e`.
  """
  _check(every, begin, end, beta1, beta2)

  def init(params: Tree) -> AllocateState:
    modules = adapters(params)
    if not modules:
      raise InputError("AdaLoRA finds no ranks to allocate: no module here has lora_e; set lora.method=adalora")
    zeros = lambda: replaced({}, jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), modules))
    mask = {path: {"lora_e": real} for path, real in real_ranks(modules).items()}
    return AllocateState(jnp.int32(0), inner.init(params), zeros(), zeros(), replaced({}, mask))

  def update(grads: Tree, state: AllocateState, params: Tree | None = None) -> tuple[Tree, AllocateState]:
    if params is None:
      raise ValueError("allocate needs the params: update(grads, state, params)")
    modules = adapters(params)
    push = jax.grad(lambda m: jnp.float32(orthogonal) * orthogonality(m))(modules)
    grads = replaced(grads, jax.tree.map(jnp.add, adapters(grads), push))
    updates, inner_state = inner.update(grads, state.inner, params)

    step = state.count + 1
    first, last = jnp.round(begin * steps), steps - jnp.round(end * steps)
    running = step < last
    moved = jax.tree.map(lambda w, u, g: jnp.abs((w + u) * g), modules, adapters(updates), adapters(grads))  # eq. 8
    # A beta of 1 holds an average where it is, to the last bit.
    means, spreads = averages(
      moved,
      adapters(state.sensitivity),
      adapters(state.uncertainty),
      jnp.where(running, beta1, 1),
      jnp.where(running, beta2, 1),
    )

    prune = ((first < step) & running & (step % every == 0)) | (step == last)
    chosen = choose(importance(means, spreads), real_ranks(modules), budget, step, first, last)
    mask, pruned = _pruned(adapters(state.mask), chosen, modules, adapters(updates), prune, prune | (step > last))
    trees = (replaced({}, modules_) for modules_ in (means, spreads, mask))
    return replaced(updates, pruned), AllocateState(step, inner_state, *trees)

  return optax.GradientTransformation(init, update)


def _pruned(
  masks: AdapterLeaves, chosen: Mapping[tuple, Array], modules: AdapterLeaves, updates: AdapterLeaves, prune: Array,
  settle: Array,
) -> tuple[AdapterLeaves, AdapterLeaves]:  # fmt: skip
  """The mask of e after this step, and e's update: −e for what is pruned where the step settles e."""
  mask, pruned = {}, {}
  for path, kept in masks.items():
    keep = jnp.where(prune, chosen[path], kept["lora_e"])
    e, u = modules[path]["lora_e"], updates[path]["lora_e"]
    mask[path] = {"lora_e": keep}
    pruned[path] = {"lora_e": jnp.where(keep | ~settle, u, -e)}
  return mask, pruned


def kept_ranks(params: Tree) -> dict[str, int]:
  """Values of e that are not zero, of each adapted module by its dotted path; `params` are one trial's."""
  return {".".join(map(str, path)): int((leaves["lora_e"] != 0).sum()) for path, leaves in adapters(params).items()}


def adapters(tree: Tree) -> AdapterLeaves:
  """The leaves of every adapter in `tree`, by module, in the order in which jax flattens it."""
  flat = flatten_dict(tree)
  paths = sorted(path[:-1] for path in flat if path[-1] == "lora_e")
  return {path: {name: flat[*path, name] for name in LEAVES if (*path, name) in flat} for path in paths}


def replaced(tree: Tree, modules: AdapterLeaves) -> Tree:
  """`tree` with these leaves in the place of its own."""
  flat = flatten_dict(tree, keep_empty_nodes=True)
  flat |= {(*path, name): leaf for path, leaves in modules.items() for name, leaf in leaves.items()}
  return unflatten_dict(flat)


def real_ranks(modules: AdapterLeaves) -> dict[tuple, Array]:
  """Which ranks (…, R) of each module are more than padding."""
  return {path: (m["lora_a"] != 0).any(-2) | (m["lora_b"] != 0).any(-1) for path, m in modules.items()}


def orthogonality(modules: AdapterLeaves) -> Array:
  """The mean over every A and B of ‖AᵀA − I‖ and ‖BBᵀ − I‖ (Frobenius), as PEFT takes eq. 4; I has real ranks alone."""
  norms, real = [], real_ranks(modules)
  for path, exists in real.items():
    identity = jnp.eye(exists.shape[-1]) * exists[..., None, :]
    for factor in (modules[path]["lora_a"], jnp.swapaxes(modules[path]["lora_b"], -1, -2)):
      squared = jnp.square(jnp.swapaxes(factor, -1, -2) @ factor - identity).sum((-1, -2))
      # The root has no gradient at zero: where all ranks are padding, or where the columns are orthonormal.
      norms.append(jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0))
  return joined(norms).sum() / jnp.maximum(2 * joined(x.any(-1) for x in real.values()).sum(), 1)


def joined(arrays: Iterable[Array]) -> Array:
  """All values in one row. (Their sum as a chain of terms would be compiled into every use of it: quadratic time.)"""
  return jnp.concatenate([jnp.ravel(x) for x in arrays])


def averages(
  moved: AdapterLeaves, means: AdapterLeaves, spreads: AdapterLeaves, beta1: Array, beta2: Array
) -> tuple[AdapterLeaves, AdapterLeaves]:
  """The running averages I̅ (eq. 9) and U̅ (eq. 10) after one more sensitivity I."""
  means = jax.tree.map(lambda old, new: beta1 * old + (1 - beta1) * new, means, moved)
  spread = lambda old, new, mean: beta2 * old + (1 - beta2) * jnp.abs(new - mean)
  return means, jax.tree.map(spread, spreads, moved, means)


def importance(means: AdapterLeaves, spreads: AdapterLeaves) -> dict[tuple, Array]:
  """How much each rank (…, R) matters: s = I̅·U̅ (eq. 11) of its e, and of its A and B on average (eq. 7)."""
  s = jax.tree.map(jnp.multiply, means, spreads)
  return {path: m["lora_e"] + m["lora_a"].mean(-2) + m["lora_b"].mean(-1) for path, m in s.items()}


def budget_at(step: Array, first: Array, last: Array, total: Array, target: Array) -> Array:
  """Ranks that survive a pruning at `step`: `total` until `first`, down as a cube to `target` from `last` (eq. 12)."""
  left = jnp.clip((last - step) / jnp.maximum(last - first, 1), 0, 1)
  # Rounded down as in PEFT; the margin is for whole numbers, which float32 may place just below themselves.
  return jnp.floor(target + (total - target) * left**3 + 1e-3)


def choose(
  scores: Mapping[tuple, Array], real: Mapping[tuple, Array], budget: Array, step: Array, first: Array, last: Array
) -> dict[tuple, Array]:
  """Which ranks (…, R) survive at `step`: the highest scores of all modules; of equal ones those that come first."""
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
  problems = []
  if every < 1:
    problems.append(f"AdaLoRA's every={every} is no number of steps between prunings; give 1 or more")
  if begin < 0 or end < 0 or begin + end >= 1:
    problems.append(f"AdaLoRA's begin={begin} and end={end} are shares of the steps; together they must be below 1")
  for name, beta in (("beta1", beta1), ("beta2", beta2)):
    if not 0 < beta < 1:
      problems.append(f"AdaLoRA's {name}={beta} must lie between 0 and 1")
  if problems:
    raise InputError(problems)

"""The training step: loss, gradient and update of every trial, as pure functions of nested dicts of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_exp.lora import methods
from lora_exp.models.modules.attention import causal_mask
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.fusion import apart, compiled_alone
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.leaf_groups import group_leaves
from lora_exp.train.compute.loss import Sums, TeacherTargets, example_loss, head_loss
from lora_exp.train.compute.optimizer import make_optimizer, schedule
from lora_exp.train.compute.program import Program, State, Tree, assemble, join_constants, split_constants

Batch = dict[str, Any]  # arrays (B, …), and the teacher's head if there is a teacher, see teacher.py
SHARED = ("teacher_head",)  # entries of a batch that have no axis of rows


def features(model: LanguageModel, batch: Batch) -> jax.Array:
  """Features (B, T, D) of a batch before the head; tokens attend within their own document."""
  return model.hidden(batch["tokens"], batch["positions"], causal_mask(batch["segments"]))[0]


def batch_loss(
  program: Program, params: Tree, trial: Hyperparameters, frozen: Tree, batch: Batch, key: jax.Array | None
) -> Sums:
  """The loss of one trial on a batch, summed over targets. Numeric examples have `x` instead of tokens."""
  model: Any = assemble(program, params, trial, frozen, key)
  if "x" in batch:
    return example_loss(model(batch["x"]), batch["y"], batch["weights"])
  return token_loss(program, model, features(model, batch), batch)


def token_loss(program: Program, model: LanguageModel, x_BTD: jax.Array, batch: Batch) -> Sums:
  """The loss of a batch of text from its features; with a teacher, the KL divergence from the teacher."""
  train = methods.get(program.method).trains_everything
  weights = batch["weights"]
  return head_loss(model.head, x_BTD, targets_of(batch), weights, train_all=train, softcap=model.softcap)


def targets_of(batch: Batch) -> Any:
  """The targets of a batch of text: token ids (B, T), or the teacher's outputs if there is a teacher."""
  return TeacherTargets(batch["teacher"], batch["teacher_head"]) if "teacher" in batch else batch["targets"]


def loss_sums(batch: Batch, sums: Sums) -> dict[str, jax.Array]:
  """The sums of a loss by the names that metrics use.

  `loss`: nats for text and classes, the KL divergence from a teacher, or squared errors. `nats`: the negative
  log-likelihood of text; absent with a teacher. `correct`: the number of targets that are the most likely token or
  class; absent for a regression.
  """
  by_name = {"loss": sums.loss}
  if "tokens" in batch and "teacher" not in batch:
    by_name["nats"] = sums.loss
  if sums.correct is not None:
    by_name["correct"] = sums.correct
  return by_name


def gradient(
  program: Program, params: Tree, trial: Hyperparameters, frozen: Tree, batch: Batch, key: jax.Array
) -> tuple[Tree, Sums, jax.Array]:
  """(gradient, sums, count) of one trial: the gradient of the mean loss with respect to the trained `params`.

  `count` is the number of targets. With `optim.accumulate`, the batch is split into microbatches; every target has the
  same weight.
  """
  tokens = batch["weights"].sum()
  parts = program.optim.accumulate
  trained, constants = split_constants(program, params)

  def part_gradient(part: Batch, key: jax.Array) -> tuple[Tree, Sums]:
    def mean_loss(trained: Tree) -> tuple[jax.Array, Sums]:
      sums = batch_loss(program, join_constants(trained, constants), trial, frozen, part, key)
      return sums.loss / jnp.maximum(tokens, 1), sums

    grads, sums = jax.grad(mean_loss, has_aux=True)(trained)
    return grads, sums

  if parts == 1:
    grads, sums = part_gradient(batch, key)
  else:
    grads, sums = _accumulate(part_gradient, batch, key, parts)
  return grads, sums, tokens


def _accumulate(
  part_gradient: Callable[[Batch, jax.Array], tuple[Tree, Sums]], batch: Batch, key: jax.Array, parts: int
) -> tuple[Tree, Sums]:
  """The sum of `part_gradient` over `parts` microbatches.

  A microbatch takes every `parts`-th row, so that no row moves to another device.
  """
  shared = {name: batch[name] for name in SHARED if name in batch}
  rows = {name: x for name, x in batch.items() if name not in shared}
  cut = {name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for name, x in rows.items()}

  def add(total: tuple[Tree, Sums], numbered: tuple[jax.Array, Batch]) -> tuple[tuple[Tree, Sums], None]:
    i, part = numbered
    return jax.tree.map(jnp.add, total, part_gradient(part | shared, jax.random.fold_in(key, i))), None

  shapes = jax.eval_shape(part_gradient, {name: x[0] for name, x in cut.items()} | shared, key)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), cut))
  return total


def over_trials(
  function: Callable, mapping: str, *trees: Tree, inline: bool = False, live: jax.Array | None = None
) -> Tree:
  """Maps `function` over the leading axis of `trees`. For a single trial, it is called directly.

  A loop does not call it for trials that are not `live` (N,) bool; their results are 0.

  In a loop, the function is compiled separately, so that a trial of a pack is bit-equal to its single run. With
  `inline`, XLA optimizes across the call and computes values that are equal for all trials only once.
  """
  if mapping == "vmap" and jax.tree.leaves(trees)[0].shape[0] > 1:
    return jax.vmap(function)(*trees)
  one_trial = function if inline else compiled_alone(function)
  if jax.tree.leaves(trees)[0].shape[0] == 1:
    return jax.tree.map(lambda x: x[None], one_trial(*jax.tree.map(lambda x: x[0], trees)))
  if live is None:
    return jax.lax.map(lambda trial: one_trial(*trial), trees)

  def if_live(trial: tuple[jax.Array, tuple[Tree, ...]]) -> Tree:
    is_live, arguments = trial
    return jax.lax.cond(is_live, one_trial, _zeros_of(one_trial), *arguments)

  return jax.lax.map(if_live, (live, trees))


def _zeros_of(function: Callable) -> Callable:
  """A function of the same arguments, whose results are 0."""

  def zeros(*arguments: Tree) -> Tree:
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  return zeros


def init_state(program: Program, params: Tree, trials: Hyperparameters) -> State:
  """The state before the first step. The arrays of `params` have a leading axis N of trials."""

  def init_optimizer(trial: Hyperparameters, params: Tree) -> Tree:
    return make_optimizer(program, trial, trial.lr).init(split_constants(program, params)[0])

  return State(jnp.int32(0), params, over_trials(init_optimizer, program.mapping, trials, params))


def state_shardings(program: Program, state: State) -> State:
  """The shardings of a state. Every jit sets them, because a changed sharding would compile the step again."""
  shardings = program.layout.shardings
  return State(
    program.layout.replicated, shardings(state.params, trials=True), shardings(state.opt, trials=True)
  )


def batch_of_order(batch: Batch, order: jax.Array) -> Batch:
  """The batch of one order of rows, from arrays with a leading axis of orders.

  It is not fused with the step, so that a trial is bit-equal to its single run.
  """
  shared = {name: batch[name] for name in SHARED if name in batch}
  return shared | {name: apart(x[order]) for name, x in batch.items() if name not in shared}


def all_finite(tree: Tree) -> jax.Array:
  """Whether no array of `tree` has a NaN or an infinite value."""
  finite = jnp.bool_(True)
  for x in jax.tree.leaves(tree):
    finite &= jnp.isfinite(x).all()
  return finite


def where(condition: jax.Array, tree: Tree, other: Tree) -> Tree:
  """`tree` if `condition` holds, else `other`."""

  def choose(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(condition, x, y)

  return jax.tree.map(choose, tree, other)


def update(
  program: Program, trial: Hyperparameters, lr: jax.Array, grads: Tree, trained: Tree, opt: Tree, loss: jax.Array
) -> tuple[Tree, Tree, jax.Array, jax.Array]:
  """The update of one trial: (trained, opt, norm, finite), with the norm of the gradient.

  If the loss, gradient, rate or new parameters are not all `finite`, `trained` and `opt` are returned unchanged.
  """
  method = methods.get(program.method)
  # Computed before leaves are joined, so that its bits do not depend on the modules that other trials adapt.
  norm = optax.tree.norm(grads)

  def changed(grads: Tree, trained: Tree, opt: Tree) -> tuple[Tree, Tree, jax.Array]:
    updates, opt = make_optimizer(program, trial, lr, norm).update(grads, opt, trained)
    trained = optax.apply_updates(trained, updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(lr)
    if not method.trains_everything:  # it would need a second copy of the whole state
      finite &= all_finite(trained)
    return trained, opt, finite

  if joins_leaves(program):
    groups = group_leaves(trained)
    joined = groups.join(grads), groups.join(trained), groups.join_state(opt)
    joined_trained, joined_opt, finite = compiled_alone(changed)(*joined)
    new_trained, new_opt = groups.split(joined_trained), groups.split_state(joined_opt)
  else:
    new_trained, new_opt, finite = changed(grads, trained, opt)
  return *where(finite, (new_trained, new_opt), (trained, opt)), norm, finite


def joins_leaves(program: Program) -> bool:
  """Whether an update joins small leaves: on one CPU device, if the optimizer treats every value by itself.

  On a GPU, XLA fuses the updates of several leaves. On several devices, joining would move leaves between them.
  """
  method = methods.get(program.method)
  one_cpu = jax.default_backend() == "cpu" and program.layout.mesh.size == 1
  return one_cpu and method.elementwise_update and not method.trains_everything


def train_step(
  program: Program, state: State, trials: Hyperparameters, frozen: Tree, batch: Batch, seed_keys: jax.Array
) -> tuple[State, dict[str, Any]]:
  """One optimizer step of N trials. Returns the new state and loss, sums, tokens, grad_norm, lr and finite, each (N,).

  A trial whose loss, gradient, rate or new parameters are not all `finite` keeps its parameters and optimizer state.

  `seed_keys` (N,): dropout keys. Trials with the same key use the same dropout masks, which are those of their single
  runs. With several orders of rows, the arrays of `batch` have a leading axis K, and each trial takes its own part.
  """
  keys = jax.vmap(jax.random.fold_in, (0, None))(seed_keys, state.step)

  def one_trial(trial: Hyperparameters, params: Tree, opt: Tree, key: jax.Array):
    factor = schedule(program.optim, trial.steps, state.step)
    trial_batch = batch if program.orders == 1 else batch_of_order(batch, trial.order)
    grads, sums, tokens = gradient(program, params, trial, frozen, trial_batch, key)
    trained, constants = split_constants(program, params)
    trained, opt, norm, finite = update(program, trial, trial.lr * factor, grads, trained, opt, sums.loss)
    count = jnp.maximum(tokens, 1)
    metrics = {
      "loss": sums.loss / count,
      "sums": loss_sums(trial_batch, sums) | {"count": count},
      "tokens": tokens,
      "grad_norm": norm,
      "lr": trial.lr * factor,
      "finite": finite,
    }
    return join_constants(trained, constants), opt, metrics

  def with_first_key(trial: Hyperparameters, params: Tree, opt: Tree):
    return one_trial(trial, params, opt, keys[0])

  # With dropout, sharing the masks saves more time than separate compilation.
  drops = program.train_graph != program.eval_graph
  mapped = (trials, state.params, state.opt)
  if program.shared_dropout_key:
    params, opt, metrics = over_trials(with_first_key, program.mapping, *mapped, inline=drops)
  else:
    params, opt, metrics = over_trials(one_trial, program.mapping, *mapped, keys, inline=drops)
  return State(state.step + 1, params, opt), metrics


def outputs(model: Any, batch: Batch) -> jax.Array:
  """The model's outputs for a batch: logits (B, T, V) for text, logits or numbers (B, O) for numeric examples."""
  return model(batch["x"]) if "x" in batch else model.logits(features(model, batch))

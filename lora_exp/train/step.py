"""The compiled step: loss, gradient and update of every trial, as pure functions of nested dicts of arrays."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_exp.lora import methods
from lora_exp.models.modules.attention import causal_mask
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.fusion import compiled_alone
from lora_exp.train.hyperparameters import Hyperparameters
from lora_exp.train.loss import Sums, TeacherTargets, example_loss, head_loss
from lora_exp.train.optimizer import make_optimizer, schedule
from lora_exp.train.program import Program, State, Tree, assemble, join_constants, split_constants

Batch = dict[str, Any]  # arrays (B, …); with a teacher also its head, see teacher.py


def features(model: LanguageModel, batch: Batch) -> jax.Array:
  """Features (B, T, D) of a batch before the head; tokens attend within their own document."""
  return model.hidden(batch["tokens"], batch["positions"], causal_mask(batch["segments"]))[0]


def batch_loss(
  program: Program, params: Tree, trial: Hyperparameters, frozen: Tree, batch: Batch, key: jax.Array | None
) -> Sums:
  """The loss of one trial on a batch, summed over the targets; examples of numbers have `x` instead of tokens."""
  model: Any = assemble(program, params, trial, frozen, key)
  if "x" in batch:
    return example_loss(model(batch["x"]), batch["y"], batch["weights"])
  return token_loss(program, model, features(model, batch), batch)


def token_loss(program: Program, model: LanguageModel, x_BTD: jax.Array, batch: Batch) -> Sums:
  """The loss of a batch of text, from its features; with a teacher, the KL divergence from the teacher's tokens."""
  train = methods.get(program.method).trains_everything
  targets: Any = TeacherTargets(batch["teacher"], batch["teacher_head"]) if "teacher" in batch else batch["targets"]
  weights = batch["weights"]
  return head_loss(model.head, x_BTD, targets, weights, train_all=train, softcap=model.softcap)


def loss_sums(batch: Batch, sums: Sums) -> dict[str, jax.Array]:
  """The sums that a loss gives, by the names that metrics use.

  `loss`: nats of text and of classes, the KL divergence from a teacher, or squared errors. `nats`: the negative
  log-likelihood of text; not with a teacher. `correct`: targets that are the most likely token or class; not of a
  regression.
  """
  named = {"loss": sums.loss}
  if "tokens" in batch and "teacher" not in batch:
    named["nats"] = sums.loss
  if sums.correct is not None:
    named["correct"] = sums.correct
  return named


def gradient(
  program: Program, params: Tree, trial: Hyperparameters, frozen: Tree, batch: Batch, key: jax.Array
) -> tuple[Tree, Sums, jax.Array]:
  """(gradient, sums, count) of one trial: the gradient of the mean loss with respect to the trained part of `params`.

  `count` is the number of targets. With `optim.accumulate` the batch is cut into parts, and every target has the same
  weight whatever its part.
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
  """The sum of `part_gradient` over `parts` parts of a batch.

  A part takes every `parts`-th row, so that each device keeps its own rows.
  """
  shared = {name: batch[name] for name in ("teacher_head",) if name in batch}
  rows = {name: x for name, x in batch.items() if name not in shared}
  cut = {name: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for name, x in rows.items()}

  def add(total: tuple[Tree, Sums], numbered: tuple[jax.Array, Batch]) -> tuple[tuple[Tree, Sums], None]:
    i, part = numbered
    return jax.tree.map(jnp.add, total, part_gradient(part | shared, jax.random.fold_in(key, i))), None

  shapes = jax.eval_shape(part_gradient, {name: x[0] for name, x in cut.items()} | shared, key)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(add, zero, (jnp.arange(parts), cut))
  return total


def over_trials(function: Callable, mapping: str, *trees: Tree, inline: bool = False) -> Tree:
  """`function` mapped over the leading axis of `trees`; for one trial it is called directly.

  In a loop it is compiled by itself, so that a trial in a pack has the bits of its solo run. With `inline`, XLA
  optimizes across the call, and computes once what is equal for all trials.
  """
  if mapping == "vmap" and jax.tree.leaves(trees)[0].shape[0] > 1:
    return jax.vmap(function)(*trees)
  one = function if inline else compiled_alone(function)
  if jax.tree.leaves(trees)[0].shape[0] == 1:
    return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], trees)))
  return jax.lax.map(lambda trial: one(*trial), trees)


def init_state(program: Program, params: Tree, trials: Hyperparameters) -> State:
  """The state before the first step; the leaves of `params` have a leading axis N of trials."""

  def init_optimizer(trial: Hyperparameters, params: Tree) -> Tree:
    return make_optimizer(program, trial, trial.lr).init(split_constants(program, params)[0])

  return State(jnp.int32(0), params, over_trials(init_optimizer, program.mapping, trials, params))


def state_shardings(program: Program, state: State) -> State:
  """The shardings of a state. Every jit gets them: otherwise the first update may move a leaf and compile again."""
  shardings = program.layout.shardings
  return State(
    program.layout.replicated, shardings(state.params, trials=True), shardings(state.opt, trials=True)
  )


def train_step(
  program: Program, state: State, trials: Hyperparameters, frozen: Tree, batch: Batch, seed_keys: jax.Array
) -> tuple[State, dict[str, Any]]:
  """One optimizer step of N trials: the new state, and loss, sums, tokens, grad_norm and lr, each (N,).

  `seed_keys` (N,): dropout keys. Trials with the same key use the same dropout mask (paired noise), which is the mask
  of each trial trained alone.
  """
  keys = jax.vmap(jax.random.fold_in, (0, None))(seed_keys, state.step)

  def one_trial(trial: Hyperparameters, params: Tree, opt: Tree, key: jax.Array):
    factor = schedule(program.optim, trial.steps, state.step)
    grads, sums, tokens = gradient(program, params, trial, frozen, batch, key)
    trained, constants = split_constants(program, params)
    updates, opt = make_optimizer(program, trial, trial.lr * factor).update(grads, opt, trained)
    count = jnp.maximum(tokens, 1)
    metrics = {
      "loss": sums.loss / count,
      "sums": loss_sums(batch, sums) | {"count": count},
      "tokens": tokens,
      "grad_norm": optax.tree.norm(grads),
      "lr": trial.lr * factor,
    }
    return join_constants(optax.apply_updates(trained, updates), constants), opt, metrics

  def with_first_key(trial: Hyperparameters, params: Tree, opt: Tree):
    return one_trial(trial, params, opt, keys[0])

  drops = program.train_graph != program.eval_graph  # shared masks save more than the separate compilation would
  mapped = (trials, state.params, state.opt)
  if program.shared_dropout_key:
    params, opt, metrics = over_trials(with_first_key, program.mapping, *mapped, inline=drops)
  else:
    params, opt, metrics = over_trials(one_trial, program.mapping, *mapped, keys, inline=drops)
  return State(state.step + 1, params, opt), metrics


def outputs(model: Any, batch: Batch) -> jax.Array:
  """The model's outputs for a batch: logits (B, T, V), or logits and numbers (B, O) for examples of numbers."""
  return model(batch["x"]) if "x" in batch else model.logits(features(model, batch))

"""The compiled step: loss, gradient and update of every trial, as pure functions of nested dicts of arrays.

Dicts cross the jit boundary and modules live inside the trace: twenty times less dispatch than `nnx.jit`. What is
equal for all trials is static in `Program`; what differs is an array in `TrialHypers`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx, traverse_util

from lora_exp.config import OptimConfig
from lora_exp.lora import AdapterLayer, Constant, Hyper, methods
from lora_exp.models.modules.attention import causal_mask
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.dropout import DropKey, Dropout, path_key
from lora_exp.runtime.fusion import compiled_alone
from lora_exp.runtime.mesh import Layout
from lora_exp.train.loss import Sums, TeacherTargets, example_loss, head_loss
from lora_exp.train.trials import TrialHypers

Tree = Any  # nested dicts of arrays
Batch = dict[str, Any]  # arrays (B, …); with a teacher also its head, see teacher.py
ADAPTER = nnx.Any(nnx.LoRAParam, Constant)  # what a trial has of its own beside the base


class State(NamedTuple):
  """What a step changes; params and opt have a leading axis of trials.

  `params` is all that a trial has of its own: what is trained, and the constants of its adapter, which a step leaves.
  """

  step: Any  # int32
  params: Tree
  opt: Tree


@dataclass(frozen=True)
class Program:
  """The static part of a step: everything that must be equal within a pack."""

  train_graph: nnx.GraphDef
  eval_graph: nnx.GraphDef
  hyper_paths: tuple[tuple, ...]
  key_paths: tuple[tuple, ...]
  modules: tuple[str, ...]  # adapted modules, in the order of TrialHypers.scale
  constants: frozenset[tuple]  # paths of the params that are not trained
  method: str
  optim: OptimConfig
  mapping: str  # of the trials: map (a loop; best on a CPU) | vmap
  shared_dropout_key: bool  # all trials drop alike: the masks of a step are made once for all of them
  layout: Layout


def split_model(
  model: nnx.Module, method: str, modules: tuple[str, ...], dropout: bool, base_dropout: bool, **rest: Any
) -> tuple[Program, Tree, Tree]:
  """`(program, params, frozen)` of an injected model, by Variable type and never by a name.

  `dropout` (static): whether any trial drops inputs of its adapters; `base_dropout`: whether the base drops as its own
  rates say.
  """
  trial_types = nnx.Param if methods.get(method).trains_everything else ADAPTER
  parts: Any = (trial_types, Hyper, DropKey, ...)
  eval_graph = nnx.graphdef(model)
  for _, module in nnx.iter_modules(model):
    if (base_dropout and isinstance(module, Dropout) and module.rate) or (dropout and isinstance(module, AdapterLayer)):
      module.deterministic = False
  train_graph, (params, hyper, keys, frozen) = nnx.graphdef(model), nnx.state(model, *parts)
  paths = lambda state: tuple(traverse_util.flatten_dict(nnx.to_pure_dict(state)))
  constants = frozenset(paths(nnx.state(model, Constant)))
  program = Program(train_graph, eval_graph, paths(hyper), paths(keys), modules, constants, method, **rest)
  return program, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def separate(program: Program, params: Tree) -> tuple[Tree, Tree]:
  """(trained, constants) of `params`."""
  if not program.constants:
    return params, {}
  flat = traverse_util.flatten_dict(params)
  part = lambda held: traverse_util.unflatten_dict({p: x for p, x in flat.items() if (p in program.constants) == held})
  return part(False), part(True)


def together(trained: Tree, constants: Tree) -> Tree:
  """The inverse of `separate`."""
  if not constants:
    return trained
  flat = traverse_util.flatten_dict
  return traverse_util.unflatten_dict(flat(trained) | flat(constants))


def assemble(program: Program, params: Tree, trial: TrialHypers, frozen: Tree, key: jax.Array | None) -> LanguageModel:
  """One trial's model, inside the trace; without a key nothing is dropped."""
  graph = program.eval_graph if key is None else program.train_graph
  root = jax.random.key(0) if key is None else key
  dotted = lambda path: ".".join(map(str, path))
  scale = lambda path: trial.scale[program.modules.index(dotted(path[:-1]))]
  hyper = {path: trial.dropout if path[-1] == "rate" else scale(path) for path in program.hyper_paths}
  keys = {path: path_key(root, dotted(path[:-1])) for path in program.key_paths}
  whole = program.layout.gather_fsdp
  model: Any = nnx.merge(graph, whole(params), *map(traverse_util.unflatten_dict, (hyper, keys)), whole(frozen))
  return model


def features(model: LanguageModel, batch: Batch) -> jax.Array:
  """Features (B, T, D) of a batch before the head; no token sees another document."""
  return model.hidden(batch["tokens"], batch["positions"], causal_mask(batch["segments"]))[0]


def batch_loss(program: Program, params: Tree, trial: TrialHypers, frozen: Tree, batch: Batch, key: jax.Array | None) -> Sums:
  """The loss of one trial on a batch, summed over the tokens (or examples: a batch with `x`) that count."""
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
  program: Program, params: Tree, trial: TrialHypers, frozen: Tree, batch: Batch, key: jax.Array
) -> tuple[Tree, Sums, jax.Array]:
  """One trial's gradient of the mean loss a token by what is trained of `params`, its sums, and the tokens counted.

  With `optim.accumulate` the batch is cut into parts; every token weighs the same, whatever its part.
  """
  tokens = batch["weights"].sum()
  parts = program.optim.accumulate
  trained, constants = separate(program, params)

  def part_gradient(part: Batch, key: jax.Array):
    def mean(trained):
      sums = batch_loss(program, together(trained, constants), trial, frozen, part, key)
      return sums.loss / jnp.maximum(tokens, 1), sums

    grads, sums = jax.grad(mean, has_aux=True)(trained)
    return grads, sums

  if parts == 1:
    grads, sums = part_gradient(batch, key)
    return grads, sums, tokens
  # Every device keeps its own rows: a part takes each `parts`-th of them.
  whole = {name: batch[name] for name in ("teacher_head",) if name in batch}
  cut = {k: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for k, x in batch.items() if k not in whole}

  def add(total, numbered):
    i, part = numbered
    return jax.tree.map(jnp.add, total, part_gradient(part | whole, jax.random.fold_in(key, i))), None

  like = jax.eval_shape(part_gradient, {name: x[0] for name, x in cut.items()} | whole, key)
  zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
  (grads, sums), _ = jax.lax.scan(add, zero, (jnp.arange(parts), cut))
  return grads, sums, tokens


def schedule(cfg: OptimConfig, steps: jax.Array, step: jax.Array) -> jax.Array:
  """The share of the peak learning rate at `step` (from 0): linear warmup, then constant, linear or cosine decay."""
  done = jnp.asarray(step, jnp.float32)
  progress = jnp.clip((done - cfg.warmup) / jnp.maximum(1, steps - cfg.warmup), 0, 1)
  decay = {
    "constant": lambda: jnp.ones(()),
    "linear": lambda: 1 - progress,
    "cosine": lambda: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
  }[cfg.schedule]()
  return jnp.minimum(1, (done + 1) / max(1, cfg.warmup)) * decay


def optimizer(program: Program, trial: TrialHypers, lr: jax.Array) -> optax.GradientTransformation:
  """The optax transformation of one trial; its rates may be traced. Weight decay is decoupled, on matrices alone.

  The method of the pack may scale some updates (LoRA+), and wrap the whole rule (AdaLoRA).
  """
  cfg, method = program.optim, methods.get(program.method)
  matrices = lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
  b1, b2 = cfg.betas
  rule = {
    "adamw": lambda: optax.adamw(lr, b1=b1, b2=b2, eps=cfg.eps, weight_decay=trial.weight_decay, mask=matrices),
    "adam": lambda: optax.adam(lr, b1=b1, b2=b2, eps=cfg.eps),
    "sgd": lambda: optax.sgd(lr, momentum=cfg.momentum or None),
  }[cfg.name]()
  rule = optax.chain(rule, method.update_factors(trial))
  if cfg.clip is not None:
    rule = optax.chain(optax.clip_by_global_norm(trial.clip), rule)
  return method.wrap_optimizer(rule, trial)


def over_trials(function: Callable, mapping: str, *trees: Tree, inline: bool = False) -> Tree:
  """`function` mapped over the leading axis of `trees`; a pack of one is called as it is.

  In a loop it is compiled by itself, so that a trial has the bits of its solo run; `inline` shows XLA into it, which
  then computes once for all trials what is equal for them.
  """
  if mapping == "vmap" and jax.tree.leaves(trees)[0].shape[0] > 1:
    return jax.vmap(function)(*trees)
  one = function if inline else compiled_alone(function)
  if jax.tree.leaves(trees)[0].shape[0] == 1:
    return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], trees)))
  return jax.lax.map(lambda trial: one(*trial), trees)


def init_state(program: Program, params: Tree, trials: TrialHypers) -> State:
  """The state before the first step; params have a leading axis of trials."""
  start = lambda trial, p: optimizer(program, trial, trial.lr).init(separate(program, p)[0])
  return State(jnp.int32(0), params, over_trials(start, program.mapping, trials, params))


def state_shardings(program: Program, state: State) -> State:
  """Where a state lies. Given to every jit: left out, the first update would move a leaf and compile again."""
  place = lambda tree: program.layout.shardings(tree, trials=True)
  return State(program.layout.replicated, place(state.params), place(state.opt))


def train_step(
  program: Program, state: State, trials: TrialHypers, frozen: Tree, batch: Batch, seed_keys: jax.Array
) -> tuple[State, dict[str, Any]]:
  """One optimizer step of N trials: the new state, and loss, sums, tokens, grad_norm and lr, each (N,).

  `seed_keys` (N,): dropout keys. Trials with the same key use the same dropout mask (paired noise), which is the mask
  of each trial trained alone.
  """
  keys = jax.vmap(jax.random.fold_in, (0, None))(seed_keys, state.step)

  def one_trial(trial: TrialHypers, params: Tree, opt: Tree, key: jax.Array):
    factor = schedule(program.optim, trial.steps, state.step)
    grads, sums, tokens = gradient(program, params, trial, frozen, batch, key)
    trained, constants = separate(program, params)
    updates, opt = optimizer(program, trial, trial.lr * factor).update(grads, opt, trained)
    count = jnp.maximum(tokens, 1)
    metrics = {
      "loss": sums.loss / count,
      "sums": loss_sums(batch, sums) | {"count": count},
      "tokens": tokens,
      "grad_norm": optax.tree.norm(grads),
      "lr": trial.lr * factor,
    }
    return together(optax.apply_updates(trained, updates), constants), opt, metrics

  drops = program.train_graph != program.eval_graph  # masks cost more to draw than to keep for all trials
  own = (trials, state.params, state.opt)
  if program.shared_dropout_key:
    alike = lambda trial, params, opt: one_trial(trial, params, opt, keys[0])
    params, opt, metrics = over_trials(alike, program.mapping, *own, inline=drops)
  else:
    params, opt, metrics = over_trials(one_trial, program.mapping, *own, keys, inline=drops)
  return State(state.step + 1, params, opt), metrics


def outputs(model: Any, batch: Batch) -> jax.Array:
  """What the model says of a batch: logits (B, T, V), all at once; of examples, its classes or numbers (B, O)."""
  return model(batch["x"]) if "x" in batch else model.logits(features(model, batch))

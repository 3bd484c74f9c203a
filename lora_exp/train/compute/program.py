"""The static program of a pack, its training state, and the split of a model into trees of arrays.

Nested dicts of arrays cross the jit boundary, and modules are assembled inside the trace; dispatch is twenty times
faster than with `nnx.jit`. Everything that all trials share is static in `Program`; everything in which they differ is
an array in `Hyperparameters`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx, traverse_util

from lora_exp.config import OptimConfig
from lora_exp.lora import AdapterLayer, Constant, Hyper, methods
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.dropout import DropKey, Dropout, path_key
from lora_exp.runtime.mesh import Layout
from lora_exp.train.compute.hyperparameters import Hyperparameters

Tree = Any  # nested dicts of arrays
Weights = tuple[Tree, Hyperparameters, Tree]  # params, hyperparameters and frozen arrays, of one model or of N trials
ADAPTER = nnx.Any(nnx.LoRAParam, Constant)  # variables that differ between trials


class State(NamedTuple):
  """The state that a step updates. The arrays of `params` and `opt` have a leading axis N of trials.

  `params` holds all variables of a trial except the base: the trained ones and the constants of its adapter.
  """

  step: Any  # number of finished steps, int32
  params: Tree
  opt: Tree


@dataclass(frozen=True)
class Program:
  """The static part of a step, which is equal for all trials of a pack."""

  train_graph: nnx.GraphDef
  eval_graph: nnx.GraphDef
  hyper_paths: tuple[tuple, ...]  # paths of scales and dropout rates
  key_paths: tuple[tuple, ...]  # paths of dropout keys
  modules: tuple[str, ...]  # adapted modules, in the order of Hyperparameters.scale
  constants: frozenset[tuple]  # paths of `params` that are not trained
  method: str
  optim: OptimConfig
  mapping: str  # how the step is mapped over trials: map (a loop) | vmap
  shared_dropout_key: bool  # all trials have the same dropout key, so masks are computed once per step
  layout: Layout
  orders: int = 1  # K, orders of rows; with several, the arrays of a training batch have a leading axis K


def split_model(
  model: nnx.Module, method: str, modules: tuple[str, ...], dropout: bool, base_dropout: bool, **rest: Any
) -> tuple[Program, Tree, Tree]:
  """Splits a model with adapters into (program, params, frozen), by Variable type and never by name.

  `dropout`: whether any trial has adapter dropout. `base_dropout`: whether the dropout layers of the base are active.
  """
  trial_types = nnx.Param if methods.get(method).trains_everything else ADAPTER
  parts: Any = (trial_types, Hyper, DropKey, ...)
  eval_graph = nnx.graphdef(model)
  for _, module in nnx.iter_modules(model):
    if (base_dropout and isinstance(module, Dropout) and module.rate) or (dropout and isinstance(module, AdapterLayer)):
      module.deterministic = False
  train_graph, (params, hyper, keys, frozen) = nnx.graphdef(model), nnx.state(model, *parts)
  constants = frozenset(_paths(nnx.state(model, Constant)))
  program = Program(train_graph, eval_graph, _paths(hyper), _paths(keys), modules, constants, method, **rest)
  return program, nnx.to_pure_dict(params), nnx.to_pure_dict(frozen)


def _paths(state: nnx.State) -> tuple[tuple, ...]:
  """The paths of all variables, as tuples of keys."""
  return tuple(traverse_util.flatten_dict(nnx.to_pure_dict(state)))


def split_constants(program: Program, params: Tree) -> tuple[Tree, Tree]:
  """Splits `params` into (trained, constants)."""
  if not program.constants:
    return params, {}
  flat = traverse_util.flatten_dict(params)
  trained = {path: x for path, x in flat.items() if path not in program.constants}
  constants = {path: x for path, x in flat.items() if path in program.constants}
  return traverse_util.unflatten_dict(trained), traverse_util.unflatten_dict(constants)


def join_constants(trained: Tree, constants: Tree) -> Tree:
  """The inverse of `split_constants`."""
  if not constants:
    return trained
  flat = traverse_util.flatten_dict
  return traverse_util.unflatten_dict(flat(trained) | flat(constants))


def assemble(
  program: Program, params: Tree, trial: Hyperparameters, frozen: Tree, key: jax.Array | None
) -> LanguageModel:
  """Builds the model of one trial inside a trace. `key` is its dropout key; None disables dropout."""
  graph = program.eval_graph if key is None else program.train_graph
  root = jax.random.key(0) if key is None else key
  hyper = {path: _hyperparameter(program, trial, path) for path in program.hyper_paths}
  keys = {path: path_key(root, _module_path(path)) for path in program.key_paths}
  gather = program.layout.gather_fsdp
  parts = gather(params), traverse_util.unflatten_dict(hyper), traverse_util.unflatten_dict(keys), gather(frozen)
  model: Any = nnx.merge(graph, *parts)
  return model


def _hyperparameter(program: Program, trial: Hyperparameters, path: tuple) -> jax.Array:
  """The dropout rate of the adapter, or the scale of the module at `path`."""
  return trial.dropout if path[-1] == "rate" else trial.scale[program.modules.index(_module_path(path))]


def _module_path(path: tuple) -> str:
  return ".".join(map(str, path[:-1]))

"""A pack ready to train: the static program and its arrays on the mesh."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lora_exp import lora
from lora_exp.lora import methods
from lora_exp.runtime.dropout import stream_key
from lora_exp.runtime.mesh import Layout, dotted, flatten
from lora_exp.train.evaluation import byte_lengths, eval_step
from lora_exp.train.hyperparameters import Hyperparameters, make_hyperparameters
from lora_exp.train.packed_adapters import initial_leaves, inject_trials
from lora_exp.train.plan import Plan, steps_of
from lora_exp.train.program import Program, State, Tree, split_model
from lora_exp.train.step import init_state, state_shardings
from lora_exp.train.teacher import Teacher, make_teacher
from lora_exp.train.trial_padding import union


@dataclass(frozen=True)
class Job:
  """The trials of a pack over one base: static program, arrays, and the state to train from.

  The first step of training donates the arrays of `state`; training returns the state after its last step.
  """

  program: Program
  steps: int
  trials: Hyperparameters
  frozen: Tree
  state: State
  keys: jax.Array  # (N,) dropout keys
  teacher: Teacher | None = None  # gives the distributions that the trials learn from
  byte_lengths: np.ndarray | None = None  # (V,) bytes of each token, where targets are text

  @cached_property
  def evaluate(self) -> Callable[..., Any]:
    """Compiled `eval_step`: (params, trials, frozen, batch) -> sums of each trial."""
    return jax.jit(partial(eval_step, self.program))

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`batch` on the devices, with the teacher's features where there is a teacher."""
    arrays = self.program.layout.put_batch(batch)
    return arrays if self.teacher is None else self.teacher(arrays)


def mapping_of(layout: Layout) -> str:
  """How the step is mapped over trials: `map`, a loop, which is best on a CPU, or `vmap`."""
  return "map" if jax.default_backend() == "cpu" and layout.mesh.shape["trial"] == 1 else "vmap"


def make_job(plan: Plan, base: Tree, steps: int, plans: Sequence[Plan] | None = None) -> Job:
  """The job of the trials `plans` (default: `plan` alone) over one `base`; abstract if `base` is.

  Raises ValueError if the trials cannot share a program.
  """
  plans = plans or [plan]
  if any(_shared(p) != _shared(plan) for p in plans):
    raise ValueError(
      "the trials of a pack must agree on all settings but rank, alpha, targets, rates, decay and seeds; on a "
      "quantised base, on targets too"
    )
  cfg, layout, model, found = plan.cfg, plan.layout, plan.model(), flatten(base)
  cfgs, tables, method = [p.cfg for p in plans], [p.table for p in plans], methods.of(cfg.lora)
  teacher = make_teacher(cfg, plan.model(), found, layout)
  mapping = mapping_of(layout)
  # A merged kernel per trial takes too much memory where several trials run at once.
  compute = "factored" if mapping == "vmap" and len(cfgs) > 1 else cfg.lora.compute
  if cfg.lora.quant:
    found = _quantised(found, {row.path for table in tables for row in table}, layout, cfg.lora.quant)
  leaves = [_leaves(p, model, found) for p in plans]
  full = {path: [p.start.full[path] if p.start else found[path] for p in plans] for path in plan.full}
  drops = (cfg.model.dropout if teacher is None else 0) or max(c.lora.dropout for c in cfgs)
  own = inject_trials(model, tables, method.name, leaves, full, compute)
  program, params, frozen = split_model(
    model,
    method.name,
    tuple(row.path for row in union(tables)),
    dropout=any(c.lora.dropout > 0 for c in cfgs),
    base_dropout=teacher is None,
    optim=cfg.optim,
    mapping=mapping,
    shared_dropout_key=not drops or len({c.train.seed for c in cfgs}) == 1,
    layout=layout,
  )
  frozen = _by_path(lambda path, x: found[path.replace(lora.FROZEN_PREFIX, "")], frozen)
  put = lambda x: jax.device_put(x, layout.replicated)
  trials = jax.tree.map(put, make_hyperparameters(cfgs, tables, steps))
  if method.trains_everything:
    repeat = lambda tree: jax.tree.map(lambda x: jnp.stack([x.astype(jnp.float32)] * len(cfgs)), tree)
    start = lambda base: init_state(program, repeat(base), trials)
    state = _make(start, program, _by_path(lambda path, x: found[path], params))
  else:
    state = _make(lambda params: init_state(program, params, trials), program, own)
  keys = put(jnp.stack([stream_key(c.train.seed, "dropout") for c in cfgs]))
  return Job(program, steps, trials, frozen, state, keys, teacher, byte_lengths(cfg.data, plan.tokenizer))


def _leaves(plan: Plan, model: nnx.Module, found: Mapping[str, jax.Array]) -> Mapping:
  """The adapter leaves of one trial at step 0: those in `lora.init_from`, or those of its method."""
  if plan.start is not None:
    return lora.completed(plan.start, lora.kernels_of(model, plan.table, found))
  return initial_leaves(model, plan.cfg, plan.table, found) if plan.table else {}


def _quantised(base: Mapping[str, jax.Array], modules: Collection[str], layout: Layout, kind: str) -> dict[str, Any]:
  """The base by dotted path with the kernels of `modules` quantised, under unchanged shardings."""
  make = lambda w: lora.quantise(w, kind)

  def one(path: str, w):
    shapes = jax.eval_shape(make, w)
    if isinstance(w, jax.ShapeDtypeStruct):
      return shapes
    place = lambda x: NamedSharding(layout.mesh, layout.spec(path, x.shape))
    return jax.jit(make, out_shardings=jax.tree.map(place, shapes))(w)

  kernels = {f"{path}.kernel" for path in modules}
  return {path: one(path, w) if path in kernels else w for path, w in base.items()}


def _shared(plan: Plan) -> tuple:
  """The settings that the trials of a job must share, because the compiled step takes them from the first."""
  cfg = plan.cfg
  optim = replace(cfg.optim, lr=0.0, weight_decay=0.0, clip=None)
  sizes = (cfg.train.batch_size, cfg.data.seq_len, methods.of(cfg.lora).name, cfg.lora.compute, cfg.lora.quant)
  quantised = sorted(row.path for row in plan.table) if cfg.lora.quant else []  # adapted kernels of the base
  return cfg.model, cfg.mesh, optim, cfg.optim.clip is None, sizes, tuple(plan.full), quantised


def _make(start: Callable[[Tree], State], program: Program, params: Tree) -> State:
  """The state that `start` makes of `params`, under its shardings; abstract if `params` are."""
  shapes = jax.eval_shape(start, params)
  places = state_shardings(program, shapes)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
  return jax.jit(start, out_shardings=places)(params)


def _by_path(function, tree: Mapping) -> dict:
  return dict(jax.tree_util.tree_map_with_path(lambda p, x: function(dotted(p), x), tree))


def abstract_job(plan: Plan, trials: int = 1) -> Job:
  """A job of `trials` equal trials over an abstract base: it can be compiled, and holds no weight."""
  places = plan.layout.shardings(plan.base)
  base = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plan.base, places)
  return make_job(plan, base, steps_of(plan.cfg, 1), [plan] * trials)

"""The job of a pack: its static program, and the arrays on the mesh that training starts from."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from lora_exp import lora
from lora_exp.config import Config
from lora_exp.lora import methods
from lora_exp.runtime.dropout import stream_key
from lora_exp.runtime.host_arrays import put_equal
from lora_exp.runtime.mesh import Layout, dotted, flatten
from lora_exp.runtime.process_group import compiled_together
from lora_exp.train.compute.hyperparameters import Hyperparameters, data_orders, make_hyperparameters
from lora_exp.train.compute.packed_adapters import initial_leaves, inject_trials
from lora_exp.train.compute.program import Program, State, Tree, split_model
from lora_exp.train.compute.step import init_state, state_shardings
from lora_exp.train.compute.teacher import Teacher, make_teacher
from lora_exp.train.compute.trial_padding import union
from lora_exp.train.evaluating.evaluation import byte_lengths, eval_step
from lora_exp.train.plan import Plan, steps_of


@dataclass(frozen=True)
class Job:
  """The N trials of a pack on one base: the static program, the arrays and the initial state.

  The first training step donates the arrays of `state`.
  """

  program: Program
  steps: int
  trials: Hyperparameters
  frozen: Tree
  state: State
  keys: jax.Array  # (N,) dropout keys
  teacher: Teacher | None = None  # its distributions are the targets
  byte_lengths: np.ndarray | None = None  # (V,) bytes of each token; None if the targets are not text
  trial_orders: tuple[int, ...] = (0,)  # `trials.order` on the host
  given: Mapping[str, jax.Array] = field(default_factory=dict)  # path -> value in the base, if the adapter changes it
  batch_size: int = 0  # rows of a training batch, over all processes

  @cached_property
  def evaluate(self) -> Callable[..., Any]:
    """The compiled `eval_step`: (params, trials, frozen, batch, segments=0, live=None) -> sums (N,) by name."""
    step, replicated = partial(eval_step, self.program), self.program.layout.replicated
    compiled = jax.jit(step, static_argnames="segments", out_shardings=replicated)
    return compiled_together(compiled) if self.program.layout.several_processes else compiled

  @cached_property
  def owned_rows(self) -> list[int] | None:
    """The rows of a batch that this process reads and no earlier process does; None with one process."""
    layout = self.program.layout
    if not layout.several_processes:
      return None
    owned = set(layout.owned_rows(self.batch_size))
    return [number for number, row in enumerate(layout.process_rows(self.batch_size)) if row in owned]

  def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Puts `batch` on the devices and adds the teacher's features if there is a teacher."""
    arrays = self.program.layout.put_batch(batch)
    return arrays if self.teacher is None else self.teacher(arrays)

  def put_training(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """`put` for a training batch, whose arrays have a leading axis of orders if the program has several.

    With several processes, `batch` has only the rows of this one, `layout.process_rows`.
    """
    layout, several = self.program.layout, self.program.orders > 1
    if layout.several_processes:
      arrays = layout.put_rows(batch, self.batch_size, several)
    else:
      arrays = layout.put_batch(batch, several)
    if self.teacher is None:
      return arrays
    return self.teacher.of_orders(arrays) if several else self.teacher(arrays)


def mapping_of(layout: Layout) -> str:
  """How the step is mapped over trials: `map` (a loop, fastest on one CPU) or `vmap`."""
  return "map" if jax.default_backend() == "cpu" and layout.mesh.shape["trial"] == 1 else "vmap"


def make_job(plan: Plan, base: Tree, steps: int, plans: Sequence[Plan] | None = None) -> Job:
  """Builds the job of the trials `plans` (default: only `plan`) on one `base`.

  If the arrays of `base` are abstract (ShapeDtypeStruct), those of the job are too. Raises ValueError if the trials
  cannot share a program.
  """
  plans = plans or [plan]
  if any(_shared(p) != _shared(plan) for p in plans):
    raise ValueError(
      "the trials of a pack must agree in all settings except rank, alpha, targets, learning rates, weight decay and "
      "seeds; with a quantised base, targets must agree too"
    )
  cfg, layout, method, model = plan.cfg, plan.layout, methods.of(plan.cfg.lora), plan.model()
  cfgs, tables, base_arrays = [p.cfg for p in plans], [p.table for p in plans], flatten(base)
  teacher = make_teacher(cfg, plan.model(), base_arrays, layout)
  arrays, given = _changed_base(plan, base_arrays)
  if cfg.lora.quant:
    arrays = _quantised(arrays, {row.path for table in tables for row in table}, layout, cfg.lora.quant)
  adapters = _inject_adapters(model, plans, arrays)
  order_seeds, trial_orders = data_orders(cfgs)
  program, params, frozen = split_model(
    model,
    method.name,
    tuple(row.path for row in union(tables)),
    dropout=any(c.lora.dropout > 0 for c in cfgs),
    base_dropout=teacher is None,
    optim=cfg.optim,
    mapping=mapping_of(layout),
    shared_dropout_key=_share_dropout_key(cfgs, base_dropout=teacher is None),
    layout=layout,
    orders=len(order_seeds),
  )
  trials = put_equal(make_hyperparameters(cfgs, tables, steps), layout.replicated)
  initial = _base_arrays(params, arrays) if method.trains_everything else adapters

  def initial_state(params: Tree) -> State:
    """The state before the first step; if everything trains, each trial gets a float32 copy of the base."""
    return init_state(program, _repeat(params, len(cfgs)) if method.trains_everything else params, trials)

  return Job(
    program=program,
    steps=steps,
    trials=trials,
    frozen=_base_arrays(frozen, arrays),
    state=_sharded_state(initial_state, program, initial),
    keys=put_equal(jnp.stack([stream_key(c.train.seed, "dropout") for c in cfgs]), layout.replicated),
    teacher=teacher,
    byte_lengths=byte_lengths(cfg.data, plan.tokenizer),
    trial_orders=tuple(trial_orders),
    given=given,
    batch_size=cfg.train.batch_size,
  )


def _changed_base(plan: Plan, arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """The arrays of the base as the adapter in `lora.init_from` changes them, and the arrays that it replaces."""
  if plan.start is None or not plan.start.base or _is_abstract(arrays):
    return arrays, {}
  return plan.start.base.apply(arrays), {path: arrays[path] for path in plan.start.base.paths()}


def _inject_adapters(model: nnx.Module, plans: Sequence[Plan], arrays: Mapping[str, Any]) -> Tree:
  """Adapts `model` in place for all trials, and returns the arrays (N, …) of their adapters at step 0.

  `arrays`: those of the base by dotted path.
  """
  plan = plans[0]
  # Under vmap, one merged kernel per trial would take too much memory.
  several_at_once = mapping_of(plan.layout) == "vmap" and len(plans) > 1
  compute = "factored" if several_at_once else plan.cfg.lora.compute
  leaves = [_initial_leaves(p, model, arrays) for p in plans]
  full = {path: [p.start.full[path] if p.start else arrays[path] for p in plans] for path in plan.full}
  return inject_trials(model, [p.table for p in plans], methods.of(plan.cfg.lora).name, leaves, full, compute)


def _share_dropout_key(cfgs: Sequence[Config], base_dropout: bool) -> bool:
  """Whether one dropout key serves all trials: they have the same seed, or nothing is dropped."""
  drops = (base_dropout and cfgs[0].model.dropout > 0) or any(c.lora.dropout > 0 for c in cfgs)
  return not drops or len({c.train.seed for c in cfgs}) == 1


def _is_abstract(arrays: Mapping[str, Any]) -> bool:
  """Whether the base has only shapes, and no values."""
  return any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays.values())


def _initial_leaves(plan: Plan, model: nnx.Module, base: Mapping[str, jax.Array]) -> Mapping:
  """The adapter leaves of one trial at step 0: loaded from `lora.init_from`, or initialised by its method.

  `base`: the arrays of the base by dotted path.
  """
  if plan.start is not None:
    return lora.completed(plan.start, lora.kernels_of(model, plan.table, base))
  return initial_leaves(model, plan.cfg, plan.table, base) if plan.table else {}


def _quantised(base: Mapping[str, jax.Array], modules: Collection[str], layout: Layout, kind: str) -> dict[str, Any]:
  """`base` (arrays by dotted path) with the kernels of `modules` quantised; shardings do not change."""
  quantise = partial(lora.quantise, kind=kind)

  def quantised_kernel(path: str, w: Any) -> Any:
    shapes = jax.eval_shape(quantise, w)
    if isinstance(w, jax.ShapeDtypeStruct):
      return shapes

    def sharding(x: jax.ShapeDtypeStruct) -> NamedSharding:
      return NamedSharding(layout.mesh, layout.spec(path, x.shape))

    return jax.jit(quantise, out_shardings=jax.tree.map(sharding, shapes))(w)

  kernels = {f"{path}.kernel" for path in modules}
  return {path: quantised_kernel(path, w) if path in kernels else w for path, w in base.items()}


def _shared(plan: Plan) -> tuple:
  """The settings that the trials of a job must share, because the compiled step has one value for all of them."""
  cfg = plan.cfg
  optim = replace(cfg.optim, lr=0.0, weight_decay=0.0, clip=None)
  sizes = (cfg.train.batch_size, cfg.data.seq_len, methods.of(cfg.lora).name, cfg.lora.compute, cfg.lora.quant)
  quantised = sorted(row.path for row in plan.table) if cfg.lora.quant else []  # adapted kernels of the base
  changes = cfg.lora.init_from if plan.start is not None and plan.start.base else None
  return cfg.model, cfg.mesh, optim, cfg.optim.clip is None, sizes, tuple(plan.full), quantised, changes


def _sharded_state(initial_state: Callable[[Tree], State], program: Program, params: Tree) -> State:
  """`initial_state(params)` with the shardings of a state; abstract if `params` are."""
  shapes = jax.eval_shape(initial_state, params)
  shardings = state_shardings(program, shapes)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(_abstract_array, shapes, shardings)
  return jax.jit(initial_state, out_shardings=shardings)(params)


def _abstract_array(x: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _base_arrays(template: Mapping, arrays: Mapping[str, Any]) -> dict:
  """`template` (nested dicts) with the arrays of the base at its paths; the prefix of frozen copies is ignored."""

  def base_array(key_path: Sequence[Any], _: Any) -> Any:
    return arrays[dotted(key_path).replace(lora.FROZEN_PREFIX, "")]

  return dict(jax.tree_util.tree_map_with_path(base_array, template))


def _repeat(tree: Tree, trials: int) -> Tree:
  """Every array of `tree` in float32, repeated along a new leading axis of trials."""

  def repeated(x: jax.Array) -> jax.Array:
    return jnp.stack([x.astype(jnp.float32)] * trials)

  return jax.tree.map(repeated, tree)


def abstract_job(plan: Plan, trials: int = 1) -> Job:
  """A job of `trials` equal trials on an abstract base. It can be compiled but holds no weights."""
  base = jax.tree.map(_abstract_array, plan.base, plan.layout.shardings(plan.base))
  return make_job(plan, base, steps_of(plan.cfg, 1), [plan] * trials)

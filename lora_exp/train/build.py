"""From a config to a pack that can train: checks on shapes alone first, then arrays on the mesh."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from lora_exp import lora, models
from lora_exp.config import ArchConfig, Config, InputError, ModelConfig
from lora_exp.data.tokenizers import Tokenizer, get_tokenizer
from lora_exp.models import weights
from lora_exp.runtime.dropout import stream_key
from lora_exp.runtime.mesh import Layout, dotted, flatten, make_mesh
from lora_exp.train.loop import Job
from lora_exp.train.step import Program, State, Tree, init_state, split_model, state_shardings
from lora_exp.train.teacher import make_teacher
from lora_exp.train.teacher import table_of as teacher_table
from lora_exp.train.trials import Table, first_leaves, full_of, inject_trials, make_trials, table_of, union, with_rank

NOT_TRAINING = ("generate", "evaluate", "merge", "export", "inspect")  # tasks whose batches divide as they like


@dataclass
class Plan:
  """What a config means before anything is allocated: shapes, targets and places."""

  cfg: Config
  tokenizer: Tokenizer
  layout: Layout
  base: Tree  # every parameter of the base, as ShapeDtypeStructs in nested dicts
  table: Table  # adapted modules
  full: list[str]  # parameters trained in full beside them
  start: lora.Adapter | None = None  # what lora.init_from holds

  @property
  def vocab_size(self) -> int:
    """V of the model, which may be larger than the tokenizer's."""
    return self.cfg.model.vocab_size or self.tokenizer.vocab_size

  def model(self) -> nnx.Module:
    """The abstract base model, new at each call: adapters are put on it in place."""
    return models.abstract(self.cfg.model, self.vocab_size)

  def parameters(self) -> dict[str, int | float]:
    """The tutorial's parameter analysis."""
    shapes, method = flatten(self.base), self.cfg.lora.method
    base = sum(x.size for x in shapes.values())
    factors = [] if method == "vera" else self.table  # VeRA's A and B are random, and not trained
    a, b = sum(r.rank * r.fan_in for r in factors), sum(r.rank * r.fan_out for r in factors)
    full = base if method == "full" else sum(shapes[path].size for path in self.full)
    adapters = sum(row.parameters for row in self.table)
    total, frozen, trainable = base + adapters, base - full, full + adapters
    percent = 100 * trainable / total
    names = ("total", "frozen", "trainable", "lora_a", "lora_b", "percent")
    return dict(zip(names, (total, frozen, trainable, a, b, percent), strict=True))


def check_built(cfg: Config) -> Plan:
  """The second stage of checks, on shapes alone: mesh, vocabulary and targets. Raises InputError with every problem."""
  problems: list[str] = []

  def collect(make):
    try:
      return make()
    except InputError as error:
      problems.extend(error.problems)
      return None

  family = models.FAMILIES[cfg.model.family]
  tokenizer = get_tokenizer(cfg.model.tokenizer, cfg.model.weights)
  mesh = collect(lambda: make_mesh(cfg.mesh))
  if (cfg.model.vocab_size or tokenizer.vocab_size) < tokenizer.vocab_size:
    instead = "take the weights' own, model.tokenizer=from_weights" if cfg.model.weights else "leave it null"
    problems.append(
      f"model.vocab_size={cfg.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} "
      f"({cfg.model.tokenizer}); {instead}"
    )
  model = models.abstract(cfg.model, tokenizer.vocab_size)
  start = collect(lambda: given_adapter(cfg, model))
  if start is not None:
    cfg = replace(cfg, lora=replace(cfg.lora, method=start.method, init="kaiming", alpha=None))
  else:
    ranked = collect(lambda: with_rank(model, cfg, family.presets))
    cfg = ranked or cfg
  table = list(start.rows) if start else (ranked and collect(lambda: table_of(model, cfg, family.presets))) or []
  full = list(start.full) if start else collect(lambda: full_of(model, table, cfg)) or []
  if cfg.data.teacher is not None:
    collect(lambda: teacher_table(model, cfg))
  if mesh is not None:
    layout = Layout(mesh, family.axes, family.units(cfg.model))
    problems += _batch_problems(cfg, layout.batch_ways)
  if problems:
    raise InputError(problems)
  return Plan(cfg, tokenizer, layout, nnx.to_pure_dict(nnx.state(model, nnx.Param)), table, full, start)


def resolved(cfg: Config) -> Config:
  """`cfg` with the rank that `lora.parameters` asks for. Raises InputError as `check_built` does."""
  return cfg if cfg.lora.parameters is None else check_built(cfg).cfg


def naming_of(cfg: ModelConfig) -> lora.Naming | None:
  """How PEFT calls the modules of this model; None of a family that others do not publish."""
  family = models.FAMILIES[cfg.family]
  if family.names is None:
    return None
  tied = (family.presets["embeddings"][0], "lm_head") if (cfg.arch or ArchConfig()).tied else None
  return lora.Naming(prefix=family.names.prefix, conv1d=not family.names.transposed, tied=tied, model_type=cfg.family)


def given_adapter(cfg: Config, model: nnx.Module) -> lora.Adapter | None:
  """The adapter in `lora.init_from`, checked against the model's shapes."""
  if cfg.lora.init_from is None:
    return None
  shapes = {path: lora.kernel_shape(module) for path, module in lora.modules(model).items()}
  parameters = {path: tuple(x.shape) for path, x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}
  return lora.load_adapter(Path(cfg.lora.init_from), naming_of(cfg.model), shapes, parameters)


def _batch_problems(cfg: Config, ways: int) -> list[str]:
  parts = cfg.optim.accumulate
  name = f"train.batch_size={cfg.train.batch_size}" + (f" / optim.accumulate={parts}" if parts > 1 else "")
  sizes = {} if cfg.task in NOT_TRAINING else {name: cfg.train.batch_size // parts}
  if cfg.model.base == "pretrain":
    sizes[f"model.pretrain.batch_size={cfg.model.pretrain.batch_size}"] = cfg.model.pretrain.batch_size
  return [
    f"{name}: {rows} rows do not divide over the mesh's {ways} batch shards (data × fsdp); "
    f"use a multiple of {ways}, or smaller mesh.data and mesh.fsdp"
    for name, rows in sizes.items()
    if rows % ways
  ]


def random_base(plan: Plan) -> Tree:
  """Random weights from `model.seed`, made where they will lie; the same bits on every mesh."""
  make = lambda: nnx.to_pure_dict(nnx.state(models.build(plan.cfg.model, plan.vocab_size), nnx.Param))
  return jax.jit(make, out_shardings=plan.layout.shardings(plan.base))()


def loaded_base(plan: Plan, source: Path) -> Tree:
  """Weights from `source`, each read straight into its place."""
  cfg = plan.cfg
  places, names = plan.layout.shardings(plan.base), models.FAMILIES[cfg.model.family].names
  return weights.load(source, plan.base, places, names, cfg.cache)


def mapping_of(layout: Layout) -> str:
  """How a step goes over its trials: one after another, which is best on a CPU, or side by side."""
  return "map" if jax.default_backend() == "cpu" and layout.mesh.shape["trial"] == 1 else "vmap"


def make_job(plan: Plan, base: Tree, steps: int, plans: Sequence[Plan] | None = None) -> Job:
  """A pack of the trials `plans` (default: `plan` alone) over one `base`; the step is not compiled yet."""
  plans = plans or [plan]
  if any(_shared(p) != _shared(plan) for p in plans):
    raise ValueError(
      "the trials of a pack must agree on all but rank, alpha, targets, rates, decay and seeds; on a quantised base, on "
      "targets too"
    )
  cfg, layout, model, found = plan.cfg, plan.layout, plan.model(), flatten(base)
  cfgs, tables = [p.cfg for p in plans], [p.table for p in plans]
  teacher = make_teacher(cfg, plan.model(), found, layout)
  mapping = mapping_of(layout)
  # Merging needs a kernel of its own for every trial: only one trial at a time may do it.
  compute = "factored" if mapping == "vmap" and len(cfgs) > 1 else cfg.lora.compute
  if cfg.lora.quant:
    found = _quantised(found, {row.path for table in tables for row in table}, layout, cfg.lora.quant)
  leaves = [_leaves(p, model, found) for p in plans]
  full = {path: [p.start.full[path] if p.start else found[path] for p in plans] for path in plan.full}
  drops = (cfg.model.dropout if teacher is None else 0) or max(c.lora.dropout for c in cfgs)
  own = inject_trials(model, tables, leaves, full, compute)
  program, params, frozen = split_model(
    model,
    cfg.lora.method,
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
  trials = jax.tree.map(put, make_trials(cfgs, tables, steps))
  if cfg.lora.method == "full":
    repeat = lambda tree: jax.tree.map(lambda x: jnp.stack([x.astype(jnp.float32)] * len(cfgs)), tree)
    start = lambda base: init_state(program, repeat(base), trials)
    state = _make(start, program, _by_path(lambda path, x: found[path], params))
  else:
    state = _make(lambda params: init_state(program, params, trials), program, own)
  keys = put(jnp.stack([stream_key(c.train.seed, "dropout") for c in cfgs]))
  return Job(program, steps, trials, frozen, state, keys, teacher)


def _leaves(plan: Plan, model: nnx.Module, found: Mapping[str, jax.Array]) -> Mapping:
  """What the adapters of one trial begin with: what was given, or what its method and init say."""
  if plan.start is not None:
    return lora.completed(plan.start, lora.kernels_of(model, plan.table, found))
  return first_leaves(model, plan.cfg, plan.table, found) if plan.table else {}


def _quantised(base: Mapping[str, jax.Array], modules: Collection[str], layout: Layout, kind: str) -> dict[str, Any]:
  """The base by dotted path with the kernels of `modules` quantised, each laid out as it was."""
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
  """What the compiled step of a pack takes from one trial for all of them."""
  cfg = plan.cfg
  optim = replace(cfg.optim, lr=0.0, weight_decay=0.0, clip=None)
  sizes = (cfg.train.batch_size, cfg.data.seq_len, cfg.lora.method, cfg.lora.compute, cfg.lora.quant)
  begun = cfg.lora.init in lora.KERNEL_INITS or (plan.start is not None and plan.start.started)
  quantised = sorted(row.path for row in plan.table) if cfg.lora.quant else []  # the base's adapted kernels
  return cfg.model, cfg.mesh, optim, cfg.optim.clip is None, sizes, begun, tuple(plan.full), quantised


def _make(start: Callable[[Tree], State], program: Program, params: Tree) -> State:
  """The state that `start` makes, laid out over the mesh; of abstract `params`, its shapes and places alone."""
  shapes = jax.eval_shape(start, params)
  places = state_shardings(program, shapes)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
  return jax.jit(start, out_shardings=places)(params)


def _by_path(function, tree: Mapping) -> dict:
  return dict(jax.tree_util.tree_map_with_path(lambda p, x: function(dotted(p), x), tree))


def trained_trial(state: State, trial: int) -> Tree:
  """The trained leaves of one trial, without the axis of trials."""
  return jax.tree.map(lambda x: x[trial], state.params)

"""From a config to a pack that can train: checks on shapes alone first, then arrays on the mesh."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp import models, weights
from lora_exp.config import Config, InputError
from lora_exp.data.tokenizers import Tokenizer, get_tokenizer
from lora_exp.dropout import stream_key
from lora_exp.loop import Job
from lora_exp.mesh import Layout, dotted, flatten, make_mesh
from lora_exp.pack import Table, inject_arms, make_arms, table_of, union
from lora_exp.step import Program, State, Tree, init_state, split_model, state_shardings


@dataclass
class Plan:
  """What a config means before anything is allocated: shapes, targets and places."""

  cfg: Config
  tokenizer: Tokenizer
  layout: Layout
  base: Tree  # every parameter of the base, as ShapeDtypeStructs in nested dicts
  table: Table  # adapted modules

  @property
  def vocab_size(self) -> int:
    """V of the model, which may be larger than the tokenizer's."""
    return self.cfg.model.vocab_size or self.tokenizer.vocab_size

  def model(self) -> nnx.Module:
    """The abstract base model, new at each call: adapters are put on it in place."""
    return models.abstract(self.cfg.model, self.vocab_size)

  def parameters(self) -> dict[str, int | float]:
    """The tutorial's parameter analysis."""
    base = sum(x.size for x in flatten(self.base).values())
    a, b = sum(r.rank * r.fan_in for r in self.table), sum(r.rank * r.fan_out for r in self.table)
    trainable = {"lora": a + b, "full": base, "frozen": 0}[self.cfg.lora.method]
    frozen = base if self.cfg.lora.method != "full" else 0
    total = frozen + trainable
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
  table = collect(lambda: table_of(model, cfg, family.presets))
  if mesh is not None:
    layout = Layout(mesh, family.axes, family.units(cfg.model))
    problems += _batch_problems(cfg, layout.batch_ways)
  if problems:
    raise InputError(problems)
  return Plan(cfg, tokenizer, layout, nnx.to_pure_dict(nnx.state(model, nnx.Param)), table or [])


def _batch_problems(cfg: Config, ways: int) -> list[str]:
  parts = cfg.optim.accumulate
  name = f"train.batch_size={cfg.train.batch_size}" + (f" / optim.accumulate={parts}" if parts > 1 else "")
  sizes = {} if cfg.task in ("generate", "evaluate") else {name: cfg.train.batch_size // parts}
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


def make_job(plan: Plan, base: Tree, steps: int, cfgs: Sequence[Config] | None = None) -> Job:
  """A pack of the arms `cfgs` (default: the plan's own config alone) over one `base`; the step is not compiled yet."""
  cfgs = list(cfgs or [plan.cfg])
  if any(_shared(c) != _shared(plan.cfg) for c in cfgs):
    raise ValueError("the arms of a pack must agree on all but rank, alpha, targets, rates, decay and seeds")
  cfg, layout, model = plan.cfg, plan.layout, plan.model()
  presets = models.FAMILIES[cfg.model.family].presets
  tables = [table_of(model, c, presets) for c in cfgs]
  mapping = "map" if jax.default_backend() == "cpu" and layout.mesh.shape["arm"] == 1 else "vmap"
  # Merging needs a kernel of its own for every arm: only one arm at a time may do it.
  compute = "factored" if mapping == "vmap" and len(cfgs) > 1 else cfg.lora.compute
  adapters = inject_arms(model, cfgs, tables, compute)
  program, trainable, frozen = split_model(
    model,
    cfg.lora.method,
    tuple(row.path for row in union(tables)),
    dropout=any(c.lora.dropout > 0 for c in cfgs),
    optim=cfg.optim,
    mapping=mapping,
    layout=layout,
  )
  found = flatten(base)
  frozen = _by_path(lambda path, x: found[path], frozen)
  put = lambda x: jax.device_put(x, layout.replicated)
  arms = jax.tree.map(put, make_arms(cfgs, tables, steps))
  if cfg.lora.method == "full":
    repeat = lambda tree: jax.tree.map(lambda x: jnp.stack([x.astype(jnp.float32)] * len(cfgs)), tree)
    start = lambda base: init_state(program, repeat(base), arms)
    state = _make(start, program, _by_path(lambda path, x: found[path], trainable))
  else:
    state = _make(lambda params: init_state(program, params, arms), program, adapters)
  return Job(program, steps, arms, frozen, state, put(stream_key(cfg.train.seed, "dropout")))


def _shared(cfg: Config) -> tuple:
  """What the compiled step of a pack takes from one config for all of its arms."""
  optim = replace(cfg.optim, lr=0.0, weight_decay=0.0, clip=None)
  sizes = (cfg.train.batch_size, cfg.data.seq_len, cfg.lora.method, cfg.lora.compute)
  return cfg.model, cfg.mesh, optim, cfg.optim.clip is None, sizes


def _make(start: Callable[[Tree], State], program: Program, params: Tree) -> State:
  """The state that `start` makes, laid out over the mesh; of abstract `params`, its shapes and places alone."""
  shapes = jax.eval_shape(start, params)
  places = state_shardings(program, shapes)
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params)):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)
  return jax.jit(start, out_shardings=places)(params)


def _by_path(function, tree: Mapping) -> dict:
  return dict(jax.tree_util.tree_map_with_path(lambda p, x: function(dotted(p), x), tree))


def trained_arm(state: State, arm: int) -> Tree:
  """The trained leaves of one arm, without the axis of arms."""
  return jax.tree.map(lambda x: x[arm], state.params)

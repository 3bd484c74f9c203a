"""A run's plan: everything that follows from its config before an array is allocated.

`make_plan` works on shapes alone, so that a bad config is refused before a weight is read or a token made. It is called
once for a run; what comes after takes the `Plan`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from flax import nnx

from lora_exp import lora
from lora_exp.config import ArchConfig, Config, InputError, LoraConfig, ModelConfig
from lora_exp.data.tokenizers import Tokenizer, get_tokenizer
from lora_exp.lora import methods
from lora_exp.models.factory import abstract_model
from lora_exp.models.registry import get_family
from lora_exp.runtime.mesh import Layout, flatten, make_mesh
from lora_exp.train.teacher import table_of as teacher_table
from lora_exp.train.trials import Table, full_of, table_of, with_rank

Tree = dict  # nested dicts
T = TypeVar("T")
TASKS_WITHOUT_STEPS = ("generate", "evaluate", "merge", "export", "inspect")  # their batches need not divide


@dataclass(frozen=True)
class Plan:
  """Shapes, targets and shardings of one run.

  `cfg` is the config with everything resolved: the rank from `lora.parameters`, the method from `lora.init_from`.
  """

  cfg: Config
  saved_cfg: Config  # for config.yaml: as given, with the rank from `lora.parameters`
  tokenizer: Tokenizer
  layout: Layout
  base: Tree  # ShapeDtypeStruct of every parameter of the base, in nested dicts
  table: Table  # adapted modules
  full: list[str]  # dotted paths of the parameters trained in full besides them
  start: lora.Adapter | None = None  # the adapter in `lora.init_from`

  @property
  def vocab_size(self) -> int:
    """V of the model, at least the tokenizer's."""
    return self.cfg.model.vocab_size or self.tokenizer.vocab_size

  def model(self) -> nnx.Module:
    """A new abstract base model; adapters are injected in place, so each caller needs its own."""
    return abstract_model(self.cfg.model, self.vocab_size)

  def parameters(self) -> dict[str, int | float]:
    """Parameter counts: total, frozen, trainable, lora_a, lora_b, and trainable as a percentage of total."""
    shapes, method = flatten(self.base), methods.of(self.cfg.lora)
    base = sum(x.size for x in shapes.values())
    trained = [leaf.axes for leaf in method.leaves.values() if leaf.trained]
    a = sum(r.rank * r.fan_in for r in self.table) * trained.count("IR")
    b = sum(r.rank * r.fan_out for r in self.table) * trained.count("RO")
    full = base if method.trains_everything else sum(shapes[path].size for path in self.full)
    adapters = sum(row.parameters for row in self.table)
    total, frozen, trainable = base + adapters, base - full, full + adapters
    percent = 100 * trainable / total
    names = ("total", "frozen", "trainable", "lora_a", "lora_b", "percent")
    return dict(zip(names, (total, frozen, trainable, a, b, percent), strict=True))


class _Problems(list[str]):
  """Problems collected so that one error lists them all."""

  def collect(self, make: Callable[[], T]) -> T | None:
    """The result of `make`, or None after adding the problems of the InputError that it raised."""
    try:
      return make()
    except InputError as error:
      self.extend(error.problems)
      return None


def make_plan(cfg: Config) -> Plan:
  """Resolves mesh, vocabulary, targets and rank of `cfg` on shapes alone. Raises InputError with every problem."""
  problems = _Problems()
  tokenizer = get_tokenizer(cfg.model.tokenizer, cfg.model.weights)
  if (cfg.model.vocab_size or tokenizer.vocab_size) < tokenizer.vocab_size:
    problems.append(_vocabulary_problem(cfg.model, tokenizer))
  family, model = get_family(cfg.model.family), abstract_model(cfg.model, tokenizer.vocab_size)
  mesh = problems.collect(lambda: make_mesh(cfg.mesh))
  start = problems.collect(lambda: _initial_adapter(cfg, model))
  if start is not None:
    saved, table, full = cfg, list(start.rows), list(start.full)
    cfg = replace(cfg, lora=replace(cfg.lora, method=start.method, init=LoraConfig.init, alpha=None))
  else:
    ranked = problems.collect(lambda: with_rank(model, cfg, family.presets))
    saved = cfg = ranked or cfg
    table = (ranked and problems.collect(lambda: table_of(model, cfg, family.presets))) or []
    full = problems.collect(lambda: full_of(model, table, cfg)) or []
  if cfg.data.teacher is not None:
    problems.collect(lambda: teacher_table(model, cfg))
  if mesh is not None:
    layout = Layout(mesh, family.axes, family.units(cfg.model), methods.of(cfg.lora).split_axes)
    problems += _batch_problems(cfg, layout.batch_ways)
  if problems:
    raise InputError(problems)
  return Plan(cfg, saved, tokenizer, layout, nnx.to_pure_dict(nnx.state(model, nnx.Param)), table, full, start)


def _vocabulary_problem(cfg: ModelConfig, tokenizer: Tokenizer) -> str:
  instead = "take the weights' own, model.tokenizer=from_weights" if cfg.weights else "leave it null"
  return (
    f"model.vocab_size={cfg.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size} ({cfg.tokenizer}); {instead}"
  )


def naming_of(cfg: ModelConfig) -> lora.Naming | None:
  """How PEFT names the modules of this model; None for a family that others do not publish.

  Nor is there a name for modules that transformers splits or joins.
  """
  family = get_family(cfg.family)
  if family.names is None or any(len(row.ours) + len(row.stored) > 2 for row in family.names.rows):
    return None
  tied = (family.presets["embeddings"][0], "lm_head") if (cfg.arch or ArchConfig()).tied else None
  return lora.Naming(prefix=family.names.prefix, conv1d=not family.names.transposed, tied=tied, model_type=cfg.family)


def _initial_adapter(cfg: Config, model: nnx.Module) -> lora.Adapter | None:
  """The adapter in `lora.init_from`, checked against the model's shapes."""
  if cfg.lora.init_from is None:
    return None
  shapes = {path: lora.kernel_shape(module) for path, module in lora.modules(model).items()}
  parameters = {path: tuple(x.shape) for path, x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}
  return lora.load_adapter(Path(cfg.lora.init_from), naming_of(cfg.model), shapes, parameters)


def _batch_problems(cfg: Config, ways: int) -> list[str]:
  parts = cfg.optim.accumulate
  name = f"train.batch_size={cfg.train.batch_size}" + (f" / optim.accumulate={parts}" if parts > 1 else "")
  sizes = {} if cfg.task in TASKS_WITHOUT_STEPS else {name: cfg.train.batch_size // parts}
  if cfg.model.base == "pretrain":
    sizes[f"model.pretrain.batch_size={cfg.model.pretrain.batch_size}"] = cfg.model.pretrain.batch_size
  return [
    f"{name}: {rows} rows do not divide over the mesh's {ways} batch shards (data × fsdp); "
    f"use a multiple of {ways}, or smaller mesh.data and mesh.fsdp"
    for name, rows in sizes.items()
    if rows % ways
  ]


def steps_of(cfg: Config, train_rows: int) -> int:
  """Optimizer steps of a run: `train.steps`, or `train.epochs` passes over the rows; none where nothing is trained."""
  if methods.of(cfg.lora).trains_nothing:
    return 0
  return cfg.train.steps or max(1, math.ceil((cfg.train.epochs or 0) * train_rows / cfg.train.batch_size))

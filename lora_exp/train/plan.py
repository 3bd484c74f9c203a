"""The plan of a run: everything that follows from its config before any array is allocated.

`make_plan` works on shapes only, so an invalid config is rejected before weights are read or text is tokenised. It is
called once per run; all later stages take the `Plan`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from flax import nnx

from lora_exp import lora
from lora_exp.config import Config, InputError, ModelConfig
from lora_exp.config.number_ranges import STEPS
from lora_exp.data.tokenization import Tokenizer, get_tokenizer
from lora_exp.data.tokenization.limited_tokenizer import LimitedTokenizer
from lora_exp.data.tokenization.tokenizer_files import FROM_WEIGHTS
from lora_exp.lora import kernels, methods
from lora_exp.models.factory import abstract_model
from lora_exp.models.registry import get_family
from lora_exp.runtime.mesh import Layout, flatten, make_mesh
from lora_exp.train.compute.teacher import table_of as teacher_table
from lora_exp.train.compute.trained_targets import Targets, peft_naming, resolve_targets
from lora_exp.train.compute.trial_padding import Table

Tree = Any  # nested dicts
TASKS_WITHOUT_STEPS = ("generate", "chat", "evaluate", "merge", "export", "inspect")  # the batch size is not checked


@dataclass(frozen=True)
class Plan:
  """Shapes, targets and shardings of one run.

  In `cfg` all settings are resolved: the rank from `lora.parameters`, the method from `lora.init_from`.
  """

  cfg: Config
  saved_cfg: Config  # for config.yaml: as given, but with the rank from `lora.parameters`
  tokenizer: Tokenizer
  layout: Layout
  base: Tree  # a ShapeDtypeStruct for each parameter of the base, in nested dicts
  shapes: Mapping[str, Any]  # the same by dotted path
  table: Table  # adapted modules
  full: list[str]  # dotted paths of parameters trained in full, in addition to the adapters
  start: lora.Adapter | None = None  # the adapter in `lora.init_from`
  given_model: ModelConfig | None = None  # the settings of the base, if `start` needs parameters that the base lacks
  new_biases: tuple[str, ...] = ()  # paths of modules to which `start` adds a bias

  @property
  def vocab_size(self) -> int:
    """The vocabulary size V of the model, at least that of the tokenizer."""
    return self.cfg.model.vocab_size or self.tokenizer.vocab_size

  def model(self) -> nnx.Module:
    """A new abstract base model. Adapters are injected in place, so each caller gets a new one."""
    return with_biases(abstract_model(self.cfg.model, self.vocab_size), self.new_biases)

  def before_changes(self) -> "Plan":
    """The plan of the base alone, as it is before `start` changes it."""
    if self.given_model is None:
      return self
    plan = replace(self, cfg=replace(self.cfg, model=self.given_model), given_model=None, new_biases=())
    base = nnx.to_pure_dict(nnx.state(plan.model(), nnx.Param))
    return replace(plan, base=base, shapes=flatten(base), table=[], full=[], start=None)

  def naming(self) -> lora.Naming | None:
    """PEFT's names of the model's modules, or None; see `peft_naming`."""
    return peft_naming(self.cfg.model, get_family(self.cfg.model.family))

  def parameters(self) -> dict[str, int | float]:
    """Parameter counts (total, frozen, trainable, lora_a, lora_b) and the trainable percentage of the total."""
    method = methods.of(self.cfg.lora)
    base = sum(x.size for x in self.shapes.values())
    full = base if method.trains_everything else sum(self.shapes[path].size for path in self.full)
    adapters = sum(row.parameters for row in self.table)
    factors = [leaf.axes for leaf in method.leaves.values() if leaf.trained]
    return {
      "total": base + adapters,
      "frozen": base - full,
      "trainable": full + adapters,
      "lora_a": factors.count("IR") * sum(self._kernel_count(row) * row.rank * row.fan_in for row in self.table),
      "lora_b": factors.count("RO") * sum(self._kernel_count(row) * row.rank * row.fan_out for row in self.table),
      "percent": 100 * (full + adapters) / (base + adapters),
    }

  def _kernel_count(self, row: lora.AdaptedModule) -> int:
    """The number of adapted kernels of a module: that of the experts, or 1."""
    if row.kernels is not None:
      return len(row.kernels)
    kernel = self.shapes.get(f"{row.path}.kernel")
    return math.prod(kernel.shape) // (row.fan_in * row.fan_out) if kernel is not None else 1


def make_plan(cfg: Config) -> Plan:
  """Resolves the mesh, vocabulary, targets and rank of `cfg`. Raises InputError that lists every problem."""
  problems = list[str]()
  tokenizer = _tokenizer(cfg.model)
  family, model = get_family(cfg.model.family), abstract_model(cfg.model, tokenizer.vocab_size)
  mesh, targets = None, Targets(cfg, cfg, [], [])
  with _collect_problems(problems):
    mesh = make_mesh(cfg.mesh)
  with _collect_problems(problems):
    targets = resolve_targets(cfg, model, family)
  given_model, cfg = cfg.model, replace(cfg, model=targets.cfg.model)
  new_biases = _new_biases(model, targets.adapter)
  changes_parameters = cfg.model != given_model or bool(new_biases)
  if changes_parameters:
    tokenizer = _tokenizer(cfg.model)
    model = with_biases(abstract_model(cfg.model, cfg.model.vocab_size or tokenizer.vocab_size), new_biases)
  if cfg.data.teacher is not None:
    with _collect_problems(problems):
      teacher_table(model, targets.cfg)
  problems += _vocabulary_problems(cfg.model, tokenizer)
  if mesh is None:
    raise InputError(problems)
  layout = Layout(mesh, family.axes, family.units(cfg.model), methods.of(targets.cfg.lora).split_axes)
  problems += _batch_problems(cfg, layout.batch_ways)
  if problems:
    raise InputError(problems)
  base = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return Plan(
    cfg=targets.cfg,
    saved_cfg=targets.saved_cfg,
    tokenizer=tokenizer,
    layout=layout,
    base=base,
    shapes=flatten(base),
    table=targets.table,
    full=targets.full,
    start=targets.adapter,
    given_model=given_model if changes_parameters else None,
    new_biases=new_biases,
  )


def without_tokenizer(cfg: Config, vocab_size: int) -> Config:
  """`cfg` for a plan of shapes only: V is given, and no file of a tokenizer is read."""
  tokenizer = cfg.model.tokenizer if cfg.model.vocab_size is None else "bytes"
  return replace(cfg, model=replace(cfg.model, tokenizer=tokenizer, vocab_size=vocab_size))


def with_biases(model: nnx.Module, paths: Iterable[str]) -> nnx.Module:
  """Gives the modules at `paths` of an abstract model a bias; returns the model."""
  modules = lora.modules(model)
  for path in paths:
    module, features = modules[path], kernels.shape(modules[path])[1]
    module.bias = nnx.Param(jax.ShapeDtypeStruct((features,), module.kernel.get_value().dtype))
    module.use_bias = True
  return model


def _new_biases(model: nnx.Module, adapter: lora.Adapter | None) -> tuple[str, ...]:
  """The paths of the modules without a bias to which `adapter` adds one."""
  if adapter is None:
    return ()
  modules = lora.modules(model)
  return tuple(path for path in adapter.base.biases if path not in modules or modules[path].bias is None)


@contextmanager
def _collect_problems(problems: list[str]) -> Iterator[None]:
  """Adds the problems of an InputError to `problems`, so that one error can list them all."""
  try:
    yield
  except InputError as error:
    problems += error.problems


def _tokenizer(cfg: ModelConfig) -> Tokenizer:
  """The tokenizer of the model. If it has more tokens than the embedding table has rows, it is limited to the rows."""
  tokenizer = get_tokenizer(cfg.tokenizer, cfg.weights)
  rows = cfg.vocab_size or tokenizer.vocab_size
  if rows >= tokenizer.vocab_size:
    return tokenizer
  advice = _vocabulary_advice(cfg, tokenizer.vocab_size - 1)
  return LimitedTokenizer(tokenizer, rows, f"{advice}, or remove the token from the data")


def _vocabulary_advice(cfg: ModelConfig, largest: int) -> str:
  """What to do if the token with the id `largest` has no row in the embedding table."""
  if not cfg.weights:
    return f"give at least {largest + 1}, or leave it null"
  if cfg.tokenizer == FROM_WEIGHTS:
    return "give the tokenizer that the weights were trained with, model.tokenizer=PATH"
  return f"use the tokenizer of the weights, model.tokenizer={FROM_WEIGHTS}"


def _vocabulary_problems(cfg: ModelConfig, tokenizer: Tokenizer) -> list[str]:
  """An error message if the token that ends or begins each document has no row in the embedding table."""
  ids = [i for i in (tokenizer.eot, tokenizer.bos) if i is not None and i >= tokenizer.vocab_size]
  if not ids:
    return []
  return [f"model.vocab_size={cfg.vocab_size}: the tokenizer ({cfg.tokenizer}) adds the token {ids[0]} to each "
          f"document, and the embedding table has no row for it; {_vocabulary_advice(cfg, max(ids))}"]


def _batch_problems(cfg: Config, ways: int) -> list[str]:
  """An error message for each batch size that is not a multiple of the number of batch shards."""
  parts = cfg.optim.accumulate
  name = f"train.batch_size={cfg.train.batch_size}" + (f" / optim.accumulate={parts}" if parts > 1 else "")
  sizes = {} if cfg.task in TASKS_WITHOUT_STEPS else {name: cfg.train.batch_size // parts}
  if cfg.model.base == "pretrain":
    sizes[f"model.pretrain.batch_size={cfg.model.pretrain.batch_size}"] = cfg.model.pretrain.batch_size
  return [
    f"{name}: {rows} rows do not divide over the mesh's {ways} batch shards (data × fsdp); "
    f"use a multiple of {ways}, or lower mesh.data or mesh.fsdp"
    for name, rows in sizes.items()
    if rows % ways
  ]


def steps_of(cfg: Config, train_rows: int) -> int:
  """The optimizer steps of a run: `train.steps`, or `train.epochs` passes over the rows; 0 if nothing is trained.

  Raises InputError if there are more than a counter in int32 can hold.
  """
  if methods.of(cfg.lora).trains_nothing:
    return 0
  steps = cfg.train.steps or max(1, math.ceil((cfg.train.epochs or 0) * train_rows / cfg.train.batch_size))
  if steps not in STEPS:
    raise InputError(f"train.epochs={cfg.train.epochs:g}: are {steps:,} steps of {cfg.train.batch_size} rows; give "
                     f"{STEPS.words(steps)} steps")
  return steps

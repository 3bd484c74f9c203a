"""The training targets of a run: adapted modules with their ranks, and parameters that are trained in full."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from lora_exp import lora
from lora_exp.config import ArchConfig, Config, InputError, LoraConfig, ModelConfig
from lora_exp.lora import kernels, methods
from lora_exp.lora.peft_files.names import ExpertNames
from lora_exp.models.family import Family
from lora_exp.runtime.mesh import flatten
from lora_exp.train.compute.rank_budget import rank_of_budget, rank_problems
from lora_exp.train.compute.trial_padding import Table


@dataclass(frozen=True)
class Targets:
  """The resolved targets of a run, and the config that results."""

  cfg: Config  # with the rank from `lora.parameters`, and the method and changes of the model from `lora.init_from`
  saved_cfg: Config  # for config.yaml: as given, but with the rank from `lora.parameters`
  table: Table  # adapted modules
  full: list[str]  # dotted paths of parameters trained in full, in addition to the adapters
  adapter: lora.Adapter | None = None  # the adapter in `lora.init_from`


def resolve_targets(cfg: Config, model: nnx.Module, family: Family) -> Targets:
  """Resolves the targets of `cfg` for the abstract base `model`. Raises InputError that lists every problem."""
  if cfg.lora.init_from is not None:
    adapter = _initial_adapter(cfg, model, family)
    if cfg.task == "train" and not adapter.rows and not adapter.full:
      raise InputError(f"lora.init_from={cfg.lora.init_from}: it has no trained module, so there is nothing to train "
                       "further; use it with task=generate or task=evaluate")
    settings = replace(cfg.lora, method=adapter.method, init=LoraConfig.init, alpha=None)
    resolved = replace(cfg, model=changed_model(cfg.model, adapter.base), lora=settings)
    return Targets(resolved, cfg, list(adapter.rows), list(adapter.full), adapter)
  cfg = with_rank(model, cfg, family.presets)
  table, problems = Table(), list[str]()
  try:
    table = table_of(model, cfg, family.presets)
  except InputError as error:
    problems += error.problems
  problems += rank_problems(table, methods.of(cfg.lora))
  try:
    full = full_of(model, table, cfg)
  except InputError as error:
    problems += error.problems
  if problems:
    raise InputError(problems)
  return Targets(cfg, cfg, table, full)


def changed_model(cfg: ModelConfig, changes: lora.BaseChanges) -> ModelConfig:
  """The settings of the model that an adapter was trained with, which may have an untied head or more tokens."""
  if changes.untied:
    cfg = replace(cfg, arch=replace(cfg.arch or ArchConfig(), tied=False))
  return replace(cfg, vocab_size=changes.vocab_size or cfg.vocab_size)


def table_of(model: nnx.Module, cfg: Config, presets: Mapping[str, Sequence[str]]) -> Table:
  """The modules of `model` that `cfg` adapts; [] if the method has no adapters."""
  c, method = cfg.lora, methods.of(cfg.lora)
  if not method.adapts_kernels:
    return []
  return lora.resolve(
    model,
    c.targets,
    method=method.name,
    rank=c.rank,
    alpha=c.alpha,
    scaling=c.scaling,
    exclude=c.exclude,
    blocks=c.layers,
    rank_pattern=c.rank_pattern,
    alpha_pattern=c.alpha_pattern,
    presets=presets,
    options=c.options,
  )


def with_rank(model: nnx.Module, cfg: Config, presets: Mapping[str, Sequence[str]]) -> Config:
  """Sets the rank of `cfg` so that the number of adapter parameters is nearest to `lora.parameters`.

  Returns `cfg` unchanged if `lora.parameters` is not set. Raises InputError if rank 1 has more parameters.
  """
  if cfg.lora.parameters is None or not methods.of(cfg.lora).adapts_kernels:
    return cfg

  def with_lora_rank(rank: int) -> Config:
    return replace(cfg, lora=replace(cfg.lora, rank=rank))

  def count(rank: int) -> int:
    return sum(row.parameters for row in table_of(model, with_lora_rank(rank), presets))

  base = sum(x.size for x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).values())
  return with_lora_rank(rank_of_budget(cfg.lora, base, count))


def full_of(model: nnx.Module, table: Table, cfg: Config) -> list[str]:
  """Dotted paths of the parameters that `cfg` trains in full: `lora.bias` and `lora.train_modules`."""
  return lora.full_paths(model, table, cfg.lora.bias, cfg.lora.train_modules)


def _initial_adapter(cfg: Config, model: nnx.Module, family: Family) -> lora.Adapter:
  """Loads the adapter in `lora.init_from` and checks it against the model's shapes."""
  shapes = {path: kernels.shape(module) for path, module in lora.modules(model).items()}
  parameters = {path: tuple(x.shape) for path, x in flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))).items()}
  return lora.load_adapter(Path(str(cfg.lora.init_from)), peft_naming(cfg.model, family), shapes, parameters)


def peft_naming(cfg: ModelConfig, family: Family) -> lora.Naming | None:
  """PEFT's names of the model's modules; None if there are none.

  There are none for families without a Hugging Face format, and if transformers splits or fuses modules differently.
  """
  if family.names is None or any(len(row.ours) + len(row.stored) > 2 for row in family.names.rows):
    return None
  tables, bare = tuple(family.presets["embeddings"]), family.names.unprefixed
  return lora.Naming(
    prefix=family.names.prefix,
    bare=bare,
    conv1d=not family.names.transposed,
    tied=(tables[0], bare[0]) if (cfg.arch or ArchConfig()).tied else None,
    model_type=cfg.family,
    tables=tables,
    experts=tuple(ExpertNames(row.ours, row.stored) for row in family.names.experts),
  )

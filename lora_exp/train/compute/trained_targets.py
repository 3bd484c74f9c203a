"""The training targets of a run: adapted modules with their ranks, and parameters that are trained in full."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from flax import nnx

from lora_exp import lora
from lora_exp.config import ArchConfig, Config, InputError, LoraConfig, ModelConfig
from lora_exp.lora import kernels, methods
from lora_exp.lora.module_table import kernel_shapes
from lora_exp.lora.peft_files.names import ExpertNames
from lora_exp.models.family import Family
from lora_exp.train.compute.selected_targets import select_targets
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
  parameters = {path: math.prod(shape) for path, shape in _parameter_shapes(model).items()}
  selected = select_targets(cfg.lora, methods.of(cfg.lora), kernel_shapes(model), parameters, family.presets)
  cfg = replace(cfg, lora=selected.lora)
  return Targets(cfg, cfg, selected.table, selected.full)


def _parameter_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
  """The shapes of all parameters of the base by dotted path."""
  parameters = nnx.to_flat_state(nnx.state(model, nnx.Param))
  return {".".join(map(str, path)): tuple(x.get_value().shape) for path, x in parameters}


def changed_model(cfg: ModelConfig, changes: lora.BaseChanges) -> ModelConfig:
  """The settings of the model that an adapter was trained with, which may have an untied head or more tokens."""
  if changes.untied:
    cfg = replace(cfg, arch=replace(cfg.arch or ArchConfig(), tied=False))
  return replace(cfg, vocab_size=changes.vocab_size or cfg.vocab_size)


def _initial_adapter(cfg: Config, model: nnx.Module, family: Family) -> lora.Adapter:
  """Loads the adapter in `lora.init_from` and checks it against the model's shapes."""
  shapes = {path: kernels.shape(module) for path, module in lora.modules(model).items()}
  naming = peft_naming(cfg.model, family)
  return lora.load_adapter(Path(str(cfg.lora.init_from)), naming, shapes, _parameter_shapes(model))


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
    tied=lora.TiedHead(tables[0], bare[0]) if (cfg.arch or ArchConfig()).tied else None,
    model_type=cfg.family,
    tables=tables,
    experts=tuple(ExpertNames(row.ours, row.stored) for row in family.names.experts),
  )

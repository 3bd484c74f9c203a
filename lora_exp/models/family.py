"""What the program knows of a model family: a class that computes it, and tables. Imports no jax."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.config_table import PublishedConfig
from lora_exp.models.tensor_names import StoredNames, TensorNames


def no_units(model: ModelConfig) -> Mapping[str, int]:
  """Every axis may be cut anywhere."""
  return {}


def head_units(model: ModelConfig) -> Mapping[str, int]:
  """Query heads are not cut."""
  return {"heads": model.heads}


def grouped_head_units(model: ModelConfig) -> Mapping[str, int]:
  """Neither query heads nor key/value heads are cut."""
  return {"heads": model.heads, "kv_heads": (model.arch or ArchConfig()).kv_heads}


def no_problems(model: ModelConfig) -> Iterable[str]:
  """Accepts all settings."""
  return ()


@dataclass(frozen=True)
class Family:
  """A family of models: its class, target presets, sharding rules, and how others publish it."""

  name: str  # model.family
  module: str  # "package.module:Class" of an nnx.Module, made by Class(model_config, vocab_size, rngs=rngs)
  presets: Mapping[str, Sequence[str]]  # preset of lora.targets -> patterns of module paths
  axes: Mapping[str, Sequence[str | None]]  # end of a parameter's path -> a logical axis for each of its dimensions
  units: Callable[[ModelConfig], Mapping[str, int]] = no_units  # logical axis -> equal pieces that are never cut
  names: TensorNames | None = None  # of tensors in published checkpoints; None if nobody publishes the family
  config: PublishedConfig | None = None  # of config.json; None if transformers has no such class
  check: Callable[[ModelConfig], Iterable[str]] = no_problems  # problems with the family's own settings

  def module_class(self) -> Any:
    """The nnx module class, imported now: only building a model needs jax."""
    module, _, name = self.module.partition(":")
    return getattr(importlib.import_module(module), name)

  def stored_names(self, model: ModelConfig) -> StoredNames:
    """How checkpoints name the tensors of `model`."""
    return StoredNames(self.names, model, self.names.prefix if self.names else "")

"""The description of a model family: its module class, and its tables (target presets, sharding, names). No jax.

The families themselves, with their presets such as `all_linear`, are in `families/NAME.py`.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.config_table import OPTIONS, PublishedConfig
from lora_exp.models.tensor_names import StoredNames, TensorNames


def no_units(model: ModelConfig) -> Mapping[str, int]:
  """No units: every axis may be split anywhere."""
  return {}


def head_units(model: ModelConfig) -> Mapping[str, int]:
  """Query heads are not split."""
  return {"heads": model.heads}


def grouped_head_units(model: ModelConfig) -> Mapping[str, int]:
  """Query heads and key/value heads are not split."""
  return {"heads": model.heads, "kv_heads": (model.arch or ArchConfig()).kv_heads}


def no_problems(model: ModelConfig) -> Iterable[str]:
  """Accepts all settings; the default `check`."""
  return ()


@dataclass(frozen=True)
class Family:
  """A model family: its module class, target presets, sharding rules, and published formats."""

  name: str  # model.family
  module: str  # "package.module:Class" of an nnx.Module, constructed by Class(model_config, vocab_size, rngs=rngs)
  presets: Mapping[str, Sequence[str]]  # preset of lora.targets -> patterns of module paths
  axes: Mapping[str, Sequence[str | None]]  # end of a parameter's path -> a logical axis for each dimension
  units: Callable[[ModelConfig], Mapping[str, int]] = no_units  # logical axis -> equal pieces that are never split
  names: TensorNames | None = None  # tensor names in published checkpoints; None if there are none
  shapes: Callable[[ModelConfig, int], Mapping[str, tuple[int, ...]]] | None = None  # of all parameters by path, from
  # the settings and V; None: the module is built to find them
  config: PublishedConfig | None = None  # fields of config.json; None if transformers has no such class
  check: Callable[[ModelConfig], Iterable[str]] = no_problems  # problems with the family's own settings

  def options(self) -> list[str]:
    """The names of the settings in `model.arch.options` that the family has, by its table of config.json."""
    paths = [*(row.ours for row in self.config.fields), *self.config.fixed] if self.config else []
    return [path.removeprefix(OPTIONS) for path in paths if path.startswith(OPTIONS)]

  def module_class(self) -> Any:
    """The nnx module class. It is imported here because only building a model needs jax."""
    module, _, name = self.module.partition(":")
    return getattr(importlib.import_module(module), name)

  def parameter_shapes(self, model: ModelConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of `model` by dotted path. Imports jax only for a family without `shapes`."""
    if self.shapes is not None:
      return dict(self.shapes(model, vocab_size))
    return dict(importlib.import_module("lora_exp.models.factory").built_shapes(model, vocab_size))

  def stored_names(self, model: ModelConfig) -> StoredNames:
    """The names of the tensors of `model` in checkpoints."""
    return StoredNames(self.names, model, self.names.prefix if self.names else "")

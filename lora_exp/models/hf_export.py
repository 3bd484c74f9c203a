"""Writes our settings as Hugging Face's config.json: the inverse of `hf_config.from_hf`, with the same tables.

A config is written only if reading it yields the same settings, so that transformers computes the same model. The
layout is that of transformers 4 (rope_theta, rope_scaling, torch_dtype), which version 5 and other readers support too.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.config_table import OPTIONS, PublishedConfig, Settings
from lora_exp.models.hf_config import ARCH, from_hf
from lora_exp.models.registry import all_families, get_family

SIZES = ("layers", "width", "heads", "ff", "max_len", "vocab_size")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf(model: ModelConfig, vocab_size: int) -> dict[str, Any] | None:
  """The config.json of `model` without dtype and token ids; None if no class of transformers computes the model.

  The model's family is tried first, then other families with the same module.
  """
  own = get_family(model.family)
  others = (family for family in all_families().values() if family.module == own.module and family is not own)
  for family in (own, *others):
    if family.config is not None:
      config = _written(family.config, model, vocab_size)
      if config is not None:
        return config
  return None


def same_model(config: Mapping[str, Any], model: ModelConfig, vocab_size: int) -> bool:
  """Whether config.json `config` describes the text part of `model`, whose max_len may be smaller."""
  if "text_config" in config:
    return False
  try:
    fields = from_hf(config)
  except InputError:
    return False
  if len(get_family(model.family).presets["embeddings"]) == 1:  # no table of positions has length max_len
    fields["max_len"] = model.max_len
  return _describes(fields, model, vocab_size)


def _describes(fields: Mapping[str, Any], model: ModelConfig, vocab_size: int) -> bool:
  """Whether `fields`, as read by `from_hf`, equal those of `model`, with the same module."""
  expected = {name: getattr(model, name) for name in SIZES} | {"vocab_size": vocab_size}
  same_module = get_family(fields["family"]).module == get_family(model.family).module
  given = {name: value for name, value in fields.items() if name != "family"}
  return same_module and given == {**expected, "arch": asdict(model.arch or ArchConfig())}


def _written(published: PublishedConfig, model: ModelConfig, vocab_size: int) -> dict[str, Any] | None:
  """The config.json of one table, or None if that class computes another model."""
  settings = _settings(model, vocab_size)
  config: dict[str, Any] = {"architectures": [published.architecture], "model_type": published.model_type}
  try:
    for row in published.fields:
      config[row.theirs] = row.write(settings.get(row.ours))
    for rule in published.rules:
      config |= rule.write(model)
    config |= dict.fromkeys(TOKENS)
    return config if _describes(from_hf(config), model, vocab_size) else None
  except InputError:
    return None


def _settings(model: ModelConfig, vocab_size: int) -> Settings:
  """The settings of `model` by path."""
  arch = asdict(model.arch or ArchConfig())
  options = arch.pop("options") or {}
  sizes = {name: getattr(model, name) for name in SIZES} | {"vocab_size": vocab_size}
  return {
    **sizes,
    **{ARCH + name: value for name, value in arch.items()},
    **{OPTIONS + name: value for name, value in options.items()},
  }

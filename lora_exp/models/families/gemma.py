"""Gemma 1 (arXiv 2403.08295): Llama's layers, with norms scaled by 1 + scale and embeddings by sqrt(width)."""

from dataclasses import replace
from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.config_rules import HEAD_GROUPS, arch_of, written_kinds
from lora_exp.models.config_table import Activation, ConfigFile, ConfigRule, PublishedConfig, Settings
from lora_exp.models.families import llama
from lora_exp.models.rotation_rules import ROTATION


def _read_activation(file: ConfigFile, settings: Settings) -> None:
  name = "hidden_activation" if file.values.get("hidden_activation") else "hidden_act"
  value = file.get(name)
  # The released files say gelu, but the models were trained with its tanh approximation.
  settings["arch.activation"] = file.activation(name, "gelu_tanh" if value == "gelu" else value)


def write_activation(model: ModelConfig) -> dict[str, Any]:
  """Writes the activation under both field names."""
  value = Activation("arch.activation", "hidden_act").write(arch_of(model).activation)
  return {"hidden_act": value, "hidden_activation": value}


def read_hidden_activation(file: ConfigFile, settings: Settings) -> None:
  """Reads the activation of Gemma 2 and 3, which have one field for it."""
  settings["arch.activation"] = file.activation("hidden_activation", file.get("hidden_activation"))


def write_windows(model: ModelConfig) -> dict[str, Any]:
  """Writes the window and the type of each layer of Gemma 2 and 3."""
  return {"sliding_window": arch_of(model).window or 4096, "layer_types": written_kinds(model)}


DEFAULTS = {
  **llama.REQUIRED_SIZES,
  "hidden_act": "gelu_pytorch_tanh",
  "head_dim": 256,
  "tie_word_embeddings": True,
}
FIXED = {"arch.norm_offset": True, "arch.embed_scale": True}
FAMILY = replace(
  llama.FAMILY,
  name="gemma",
  config=PublishedConfig(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    fields=(*llama.SIZE_FIELDS, *llama.BIAS_FIELDS),
    defaults={**DEFAULTS, "num_key_value_heads": 16, "max_position_embeddings": 8192},
    fixed=FIXED,
    rules=(HEAD_GROUPS, ROTATION, ConfigRule(_read_activation, write_activation)),
  ),
)

"""Mistral (arXiv 2310.06825): Llama's layers with sliding-window attention in every layer."""

from dataclasses import replace

from lora_exp.models.config_rules import HEAD_GROUPS, WINDOW
from lora_exp.models.config_table import PublishedConfig
from lora_exp.models.families import llama
from lora_exp.models.rotation_rules import ROTATION

FAMILY = replace(
  llama.FAMILY,
  name="mistral",
  config=PublishedConfig(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=(*llama.SIZE_FIELDS, *llama.ACTIVATION_FIELDS, *llama.BIAS_FIELDS),
    defaults={
      **llama.REQUIRED_SIZES,
      "hidden_act": "silu",
      "num_key_value_heads": 8,
      "sliding_window": 4096,
      "max_position_embeddings": 131072,
    },
    rules=(HEAD_GROUPS, ROTATION, WINDOW),
  ),
)

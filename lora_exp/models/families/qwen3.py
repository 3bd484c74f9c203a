"""Qwen3, dense (arXiv 2505.09388): Llama's layers with RMS norms on the queries and keys of each head."""

from dataclasses import replace

from lora_exp.models.config_rules import HEAD_GROUPS
from lora_exp.models.config_table import PublishedConfig
from lora_exp.models.families import llama, qwen2
from lora_exp.models.rotation_rules import ROTATION

FAMILY = replace(
  llama.FAMILY,
  name="qwen3",
  config=PublishedConfig(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(*llama.SIZE_FIELDS, *llama.ACTIVATION_FIELDS, *llama.ATTENTION_BIAS_FIELDS),
    defaults={**qwen2.DEFAULTS, "head_dim": 128},
    fixed={"arch.qk_norm": True},
    rules=(HEAD_GROUPS, ROTATION, qwen2.UPPER_WINDOWS),
  ),
)

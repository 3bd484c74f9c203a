"""OLMo 2 (arXiv 2501.00656): Llama's layers with norms after attention and feed-forward instead of before.

Queries and keys are normalised over all heads together.
"""

from dataclasses import replace

from lora_exp.models.config_rules import HEAD_GROUPS
from lora_exp.models.config_table import PublishedConfig
from lora_exp.models.families import llama
from lora_exp.models.rotation_rules import ROTATION

FAMILY = replace(
  llama.FAMILY,
  name="olmo2",
  config=PublishedConfig(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    fields=(*llama.SIZE_FIELDS, *llama.ACTIVATION_FIELDS, *llama.ATTENTION_BIAS_FIELDS),
    defaults={
      "num_hidden_layers": 32,
      "hidden_size": 4096,
      "num_attention_heads": 32,
      "intermediate_size": 11008,
      "vocab_size": 50304,
      "hidden_act": "silu",
      "max_position_embeddings": 2048,
      "rms_norm_eps": 1e-5,
    },
    fixed={
      "arch.pre_norms": False,
      "arch.post_norms": True,
      "arch.qk_norm": True,
      "arch.qk_norm_per_head": False,
    },
    rules=(HEAD_GROUPS, ROTATION),
  ),
)

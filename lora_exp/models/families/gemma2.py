"""Gemma 2 (arXiv 2408.00118): Gemma's layers with norms on both sides, soft caps, and windows in every second layer."""

from dataclasses import replace

from lora_exp.models.config_rules import FULL, HEAD_GROUPS, SLIDING, layer_kinds, set_windows
from lora_exp.models.config_table import ConfigFile, ConfigRule, Number, PublishedConfig, Settings
from lora_exp.models.families import gemma, llama
from lora_exp.models.rotation_rules import ROTATION


def _read_windows(file: ConfigFile, settings: Settings) -> None:
  """The layers 0, 2, 4, … have the window, unless `layer_types` states other ones."""
  layers = settings["layers"]
  set_windows(file, settings, layer_kinds(file, layers) or [FULL if i % 2 else SLIDING for i in range(layers)])


FAMILY = replace(
  llama.FAMILY,
  name="gemma2",
  config=PublishedConfig(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    fields=(
      *llama.SIZE_FIELDS,
      *llama.ATTENTION_BIAS_FIELDS,
      Number("arch.query_scale", "query_pre_attn_scalar", whole=True),
      Number("arch.logit_softcap", "final_logit_softcapping"),
      Number("arch.attn_softcap", "attn_logit_softcapping"),
    ),
    defaults={
      **gemma.DEFAULTS,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
      "sliding_window": 4096,
      "max_position_embeddings": 8192,
      "hidden_activation": "gelu_pytorch_tanh",
      "query_pre_attn_scalar": 256,
      "final_logit_softcapping": 30.0,
      "attn_logit_softcapping": 50.0,
    },
    fixed={**gemma.FIXED, "arch.post_norms": True},
    rules=(
      HEAD_GROUPS,
      ROTATION,
      ConfigRule(_read_windows, gemma.write_windows),
      ConfigRule(gemma.read_hidden_activation, gemma.write_activation),
    ),
  ),
)

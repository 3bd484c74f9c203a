"""Gemma 3 (arXiv 2503.19786): sliding-window and full-attention layers, and norms before and after each block part.

For a model with vision, only the text model is read. `attn_logit_softcapping` is from Gemma 2; Gemma 3 ignores it.
"""

from dataclasses import replace
from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.config_rules import FULL, HEAD_GROUPS, SLIDING, arch_of, layer_kinds, set_windows
from lora_exp.models.config_table import ConfigFile, ConfigRule, Number, PublishedConfig, Settings
from lora_exp.models.families import gemma, llama
from lora_exp.models.rotation_rules import read_rotation, rotation_fields, write_rotation


def _read_rotations(file: ConfigFile, settings: Settings) -> None:
  """Reads the rotary embedding of full-attention layers, and that of sliding-window layers."""
  given = ConfigFile(file.mapping("rope_parameters"), problems=file.problems)
  if given.values and FULL not in given.values and SLIDING not in given.values:
    file.problems.append("rope_parameters: must contain full_attention and sliding_attention")
  full = {"rope_theta": file.values.get("rope_theta", 1e6), **given.mapping(FULL), **file.mapping("rope_scaling")}
  without_kinds = ConfigFile(
    {**file.values, "rope_parameters": full, "rope_scaling": None}, file.defaults, file.problems
  )
  fields = rotation_fields(without_kinds)
  settings["arch.rope_theta"], settings["arch.rope_scaling"] = read_rotation(file, fields, settings)
  local = {"rope_theta": file.values.get("rope_local_base_freq", 1e4), **given.mapping(SLIDING)}
  settings["arch.rope_local_theta"], scaled = read_rotation(file, local, settings)
  if scaled:
    file.problems.append("rope_parameters.sliding_attention: layers with a window cannot have a scaled rotation")


def _write_rotations(model: ModelConfig) -> dict[str, Any]:
  return {**write_rotation(model), "rope_local_base_freq": arch_of(model).rope_local_theta}


def _read_windows(file: ConfigFile, settings: Settings) -> None:
  layers, pattern = settings["layers"], file.count("sliding_window_pattern")
  usual = [SLIDING if (i + 1) % pattern else FULL for i in range(layers)]
  set_windows(file, settings, layer_kinds(file, layers) or usual)


def _write_activation(model: ModelConfig) -> dict[str, Any]:
  return {**gemma.write_activation(model), "attn_logit_softcapping": None}


FAMILY = replace(
  llama.FAMILY,
  name="gemma3",
  config=PublishedConfig(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields=(
      *llama.SIZE_FIELDS,
      *llama.BIAS_FIELDS,
      Number("arch.query_scale", "query_pre_attn_scalar", whole=True),
      Number("arch.logit_softcap", "final_logit_softcapping"),
    ),
    defaults={
      **gemma.DEFAULTS,
      "num_attention_heads": 8,
      "num_key_value_heads": 4,
      "vocab_size": 262208,
      "sliding_window": 4096,
      "max_position_embeddings": 131072,
      "hidden_activation": "gelu_pytorch_tanh",
      "sliding_window_pattern": 6,
      "query_pre_attn_scalar": 256,
    },
    fixed={**gemma.FIXED, "arch.post_norms": True, "arch.qk_norm": True},
    rules=(
      HEAD_GROUPS,
      ConfigRule(_read_rotations, _write_rotations),
      ConfigRule(_read_windows, gemma.write_windows),
      ConfigRule(gemma.read_hidden_activation, _write_activation),
    ),
    wrappers={"gemma3": "Gemma3ForConditionalGeneration"},
  ),
)

"""Qwen2 and 2.5 (arXiv 2407.10671): Llama's layers with biases on queries, keys and values, and optional windows."""

from dataclasses import replace
from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.config_rules import (
  FULL,
  HEAD_GROUPS,
  SLIDING,
  arch_of,
  layer_kinds,
  set_windows,
  written_kinds,
)
from lora_exp.models.config_table import ConfigFile, ConfigRule, PublishedConfig, Settings
from lora_exp.models.families import llama
from lora_exp.models.rotation_rules import ROTATION


def _read_windows(file: ConfigFile, settings: Settings) -> None:
  """Reads the windows: layers from `max_window_layers` on have one, or those in `layer_types`."""
  if not file.flag("use_sliding_window"):
    return
  first = file.get("max_window_layers")
  if isinstance(first, bool) or not isinstance(first, int):
    file.refuse("max_window_layers", "must be a number of layers")
    first = 0
  usual = [SLIDING if i >= first else FULL for i in range(settings["layers"])]
  set_windows(file, settings, layer_kinds(file, settings["layers"]) or usual)


def _write_windows(model: ModelConfig) -> dict[str, Any]:
  window = arch_of(model).window
  if window is None:
    return {}
  return {
    "use_sliding_window": True,
    "sliding_window": window,
    "max_window_layers": 0,
    "layer_types": written_kinds(model),
  }


UPPER_WINDOWS = ConfigRule(_read_windows, _write_windows)
DEFAULTS = {
  **llama.REQUIRED_SIZES,
  "num_key_value_heads": 32,
  "hidden_act": "silu",
  "max_position_embeddings": 32768,
  "sliding_window": 4096,
  "max_window_layers": 28,
}
FAMILY = replace(
  llama.FAMILY,
  name="qwen2",
  config=PublishedConfig(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(*llama.SIZE_FIELDS, *llama.ACTIVATION_FIELDS),
    defaults=DEFAULTS,
    fixed={"arch.qkv_bias": True},
    rules=(HEAD_GROUPS, ROTATION, UPPER_WINDOWS),
  ),
)

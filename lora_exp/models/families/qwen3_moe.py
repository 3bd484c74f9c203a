"""Qwen3 with experts (arXiv 2505.09388): Qwen3's attention, with experts in all or some layers."""

from dataclasses import dataclass, replace
from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.config_rules import HEAD_GROUPS, arch_of
from lora_exp.models.config_table import ConfigField, ConfigFile, ConfigRule, Count, Flag, PublishedConfig, Settings
from lora_exp.models.families import llama, mixtral, qwen2
from lora_exp.models.rotation_rules import ROTATION
from lora_exp.models.tensor_names import ExpertRow


@dataclass(frozen=True)
class DenseLayers(ConfigField):
  """The layers without experts: those in `mlp_only_layers`, and those skipped by `decoder_sparse_step`."""

  def read(self, file: ConfigFile, settings: Settings) -> list[int]:
    step, listed = file.count("decoder_sparse_step"), file.get(self.theirs) or []
    if not isinstance(listed, list) or not all(isinstance(i, int) for i in listed):
      file.refuse(self.theirs, "must be a list of layer numbers")
      return []
    return [i for i in range(settings["layers"]) if i in listed or (i + 1) % step]


def _read_window(file: ConfigFile, settings: Settings) -> None:
  """All layers have the window, or none."""
  window = file.count("sliding_window", null=0) if file.flag("use_sliding_window") else 0
  settings["arch.window"] = window or None


def _write_window(model: ModelConfig) -> dict[str, Any]:
  window = arch_of(model).window
  return {} if window is None else {"use_sliding_window": True, "sliding_window": window}


SIZE_FIELDS = tuple(replace(row, theirs="moe_intermediate_size") if row.ours == "ff" else row
                    for row in llama.SIZE_FIELDS)  # fmt: skip
FAMILY = replace(
  mixtral.FAMILY,
  name="qwen3_moe",
  names=replace(
    llama.NAMES,
    experts=(
      ExpertRow(mixtral.EXPERTS[0], ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj")),
      ExpertRow(mixtral.EXPERTS[1], ("mlp.experts.{}.down_proj",)),
    ),
  ),
  config=PublishedConfig(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=(
      *SIZE_FIELDS,
      *llama.ACTIVATION_FIELDS,
      *llama.ATTENTION_BIAS_FIELDS,
      mixtral.ExpertCount("arch.options.num_experts", "num_experts"),
      Count("arch.options.num_experts_per_tok", "num_experts_per_tok"),
      Flag("arch.options.norm_topk_prob", "norm_topk_prob"),
      DenseLayers("arch.options.dense_layers", "mlp_only_layers"),
      Count("arch.options.dense_ff", "intermediate_size"),
    ),
    defaults={
      **qwen2.DEFAULTS,
      "num_key_value_heads": 4,
      "intermediate_size": 6144,
      "moe_intermediate_size": 768,
      "num_experts": 128,
      "num_experts_per_tok": 8,
      "norm_topk_prob": False,
      "decoder_sparse_step": 1,
    },
    fixed={"arch.qk_norm": True},
    rules=(HEAD_GROUPS, ROTATION, ConfigRule(_read_window, _write_window)),
  ),
)

"""Mixtral (arXiv 2401.04088): Mistral's layers with experts, of which the router chooses two for each token."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.arch_checks import check_rotary
from lora_exp.models.config_rules import HEAD_GROUPS, WINDOW, arch_of
from lora_exp.models.config_table import ConfigFile, Count, PublishedConfig, Settings
from lora_exp.models.families import llama
from lora_exp.models.parameter_shapes import moe_shapes
from lora_exp.models.rotation_rules import ROTATION
from lora_exp.models.tensor_names import ExpertRow, NameRow

EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
MLP = (*EXPERTS, *llama.FEED_FORWARD)  # FEED_FORWARD in layers without experts (Qwen3-MoE)
PRESETS = {**llama.FAMILY.presets, "mlp": MLP, "all_linear": (*llama.ATTENTION, *MLP)}
AXES = {
  **llama.FAMILY.axes,
  "mlp.gate.kernel": ("embed", None),
  "gate_up_proj.kernel": (None, "embed", "mlp"),
  "down_proj.kernel": (None, "mlp", "embed"),
}


@dataclass(frozen=True)
class ExpertCount(Count):
  """The number of experts, which transformers writes under one of two names."""

  def read(self, file: ConfigFile, settings: Settings) -> int:
    names = (self.theirs, "num_local_experts", "num_experts")
    return file.count(next((name for name in names if name in file.values), self.theirs))


SIZES = {"num_experts": "experts of a layer", "num_experts_per_tok": "experts that compute a token"}


def check_experts(model: ModelConfig) -> Iterator[str]:
  """Checks the settings of a model with experts."""
  yield from check_rotary(model)
  options: dict[str, Any] = arch_of(model).options or {}
  for name, meaning in SIZES.items():
    if not isinstance(options.get(name), int) or options[name] < 1:
      yield f"model.arch.options.{name}={options.get(name)}: must be the number of {meaning}, at least 1"
      return
  count, chosen = (int(options[name]) for name in SIZES)
  if chosen > count:
    yield f"model.arch.options.num_experts_per_tok={chosen}: must be at most num_experts={count}"


FAMILY = replace(
  llama.FAMILY,
  name="mixtral",
  module="lora_exp.models.modules.moe_decoder:MoE",
  shapes=moe_shapes,
  presets=PRESETS,
  axes=AXES,
  names=replace(
    llama.NAMES,
    rows=(NameRow(("mlp.gate",), ("block_sparse_moe.gate",)),),
    experts=(
      ExpertRow(EXPERTS[0], ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3")),
      ExpertRow(EXPERTS[1], ("block_sparse_moe.experts.{}.w2",)),
    ),
  ),
  config=PublishedConfig(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    fields=(
      *llama.SIZE_FIELDS,
      *llama.ACTIVATION_FIELDS,
      ExpertCount("arch.options.num_experts", "num_local_experts"),
      Count("arch.options.num_experts_per_tok", "num_experts_per_tok"),
    ),
    defaults={
      **llama.REQUIRED_SIZES,
      "hidden_act": "silu",
      "num_key_value_heads": 8,
      "sliding_window": None,
      "max_position_embeddings": 131072,
      "rms_norm_eps": 1e-5,
      "rope_theta": 1e6,
      "num_local_experts": 8,
      "num_experts_per_tok": 2,
    },
    fixed={"arch.options.norm_topk_prob": True},
    rules=(HEAD_GROUPS, ROTATION, WINDOW),
  ),
  check=check_experts,
)

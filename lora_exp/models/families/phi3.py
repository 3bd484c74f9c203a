"""Phi-3 (arXiv 2404.14219) and Phi-4-mini (arXiv 2503.01743): Llama with fused kernels, partial and scaled rotary.

Each fused kernel is one module, as in transformers, so that PEFT's adapters can be read and written.
"""

from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.arch_checks import check_rotary
from lora_exp.models.config_rules import HEAD_GROUPS, WINDOW, arch_of
from lora_exp.models.config_table import ConfigFile, ConfigRule, PublishedConfig, Settings, is_positive, shortened
from lora_exp.models.families import llama
from lora_exp.models.family import Family, grouped_head_units
from lora_exp.models.parameter_shapes import phi3_shapes
from lora_exp.models.rotation_rules import LENGTH, read_scaling, rotation_fields, rotation_kind, write_rotation

LONGROPE = ("longrope", "su", "yarn")  # the name, and its names in earlier files of Phi-3


def _read_rotation(file: ConfigFile, settings: Settings) -> None:
  """Reads a partial rotary embedding; `longrope` has a factor for each pair of rotated features."""
  given = rotation_fields(file)
  part, kind = given.get("partial_rotary_factor"), rotation_kind(given)
  part = 1.0 if part is None else part
  if not is_positive(part) or part > 1:
    file.problems.append(f"partial_rotary_factor={shortened(part)}: must be a number above 0 and at most 1")
    part = 1.0
  settings["arch.partial_rotary_factor"] = float(part)
  if kind not in ("default", *LONGROPE):
    file.problems.append(f"rope_scaling.rope_type={shortened(kind)}: not supported; choose default, longrope")
    kind = "default"
  kind, rotated = "longrope" if kind in LONGROPE else kind, int(settings["arch.head_dim"] * part)
  given |= {LENGTH: file.get(LENGTH) or 4096}
  settings["arch.rope_theta"], settings["arch.rope_scaling"] = read_scaling(file, given, kind, rotated, settings)


def _write_rotation(model: ModelConfig) -> dict[str, Any]:
  """Writes the original length outside `rope_scaling`, where Phi-3's class expects it."""
  fields = {**write_rotation(model), "partial_rotary_factor": arch_of(model).partial_rotary_factor}
  scaling = fields["rope_scaling"]
  return fields | {LENGTH: scaling[LENGTH]} if scaling else fields


ATTENTION = ("self_attn.qkv_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_up_proj", "mlp.down_proj")
FAMILY = Family(
  name="phi3",
  module="lora_exp.models.modules.phi3_decoder:Phi3",
  shapes=phi3_shapes,
  presets={
    "attention": ATTENTION,
    "qv": ("self_attn.qkv_proj",),  # one kernel for queries, keys and values: the keys are adapted too
    "mlp": FEED_FORWARD,
    "all_linear": (*ATTENTION, *FEED_FORWARD),
    "embeddings": ("embed_tokens",),
    "head": ("lm_head",),
  },
  axes={
    "embed_tokens.embedding": ("vocab", "embed"),
    "qkv_proj.kernel": ("embed", "heads"),
    "o_proj.kernel": ("heads", "embed"),
    "gate_up_proj.kernel": ("embed", "mlp"),
    "down_proj.kernel": ("mlp", "embed"),
    "lm_head.kernel": ("embed", "vocab"),
  },
  units=grouped_head_units,
  names=llama.FAMILY.names,
  config=PublishedConfig(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    fields=(*llama.SIZE_FIELDS, *llama.ACTIVATION_FIELDS),
    defaults={
      "num_hidden_layers": 32,
      "hidden_size": 3072,
      "num_attention_heads": 32,
      "intermediate_size": 8192,
      "vocab_size": 32064,
      "hidden_act": "silu",
      "max_position_embeddings": 4096,
      LENGTH: 4096,
      "rms_norm_eps": 1e-5,
    },
    rules=(HEAD_GROUPS, ConfigRule(_read_rotation, _write_rotation), WINDOW),
  ),
  check=check_rotary,
)

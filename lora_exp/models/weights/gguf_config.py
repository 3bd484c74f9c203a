"""Reads the architecture of a GGUF file as the config.json of the same model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.runtime.foreign_files import damage_reported
from lora_exp.runtime.gguf_header import GgufHeader, read_gguf

FIELDS = {  # key without the architecture's name -> field of config.json
  "block_count": "num_hidden_layers", "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
  "expert_feed_forward_length": "moe_intermediate_size", "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
  "context_length": "max_position_embeddings", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "rope.freq_base": "rope_theta", "attention.sliding_window": "sliding_window",
  "attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping",
  "expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok",
}  # fmt: skip
# tensors with a divisor for each rotary frequency: for contexts of any length, short contexts, and long contexts
ROPE_FREQUENCIES, SHORT_FACTORS, LONG_FACTORS = (
  f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")
)
LENGTH = "original_max_position_embeddings"


@dataclass(frozen=True)
class GgufArchitecture:
  """A value of `general.architecture`: the model_type in transformers, and how tensors differ."""

  model_type: str
  config: Mapping[str, Any] = field(default_factory=dict)  # fields that the file does not have
  interleaved: bool = False  # the rows of q and k are in the order of rotated pairs
  norm_offset: bool = False  # 1 is added to the stored scales of norms
  names: Mapping[str, str] = field(default_factory=dict)  # tensors of a block with other names than Llama's


SANDWICH = {  # norms before and after attention and feed-forward
  "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
  "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
ARCHITECTURES = {
  "llama": GgufArchitecture("llama", interleaved=True),
  "mistral": GgufArchitecture("mistral", interleaved=True),
  "qwen2": GgufArchitecture("qwen2"),
  "qwen3": GgufArchitecture("qwen3"),
  "qwen3moe": GgufArchitecture("qwen3_moe", {"norm_topk_prob": True}),
  "gemma": GgufArchitecture("gemma", norm_offset=True),
  "gemma2": GgufArchitecture("gemma2", norm_offset=True, names=SANDWICH),
  "gemma3": GgufArchitecture("gemma3_text", norm_offset=True, names=SANDWICH),
  "olmo2": GgufArchitecture("olmo2", names=SANDWICH),
  "phi3": GgufArchitecture("phi3", names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
}
EXPERTS = {  # model_type -> names of the modules of one expert ({} is its number) and of the router
  "mixtral": {
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1", "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2", "ffn_gate_inp": "block_sparse_moe.gate",
  },
  "qwen3_moe": {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj", "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj", "ffn_gate_inp": "mlp.gate",
  },
}  # fmt: skip


def gguf_architecture(header: GgufHeader) -> GgufArchitecture:
  """The architecture of the file. Raises InputError if it is not supported."""
  name, parts = header.settings.get("general.architecture"), header.settings.get("split.count", 1)
  if parts != 1:
    raise InputError(f"{header.file} is one of {parts} files of a model; merge them with llama-gguf-split --merge")
  if name not in ARCHITECTURES:
    raise InputError(f"{header.file} has the architecture {name}; supported in GGUF files are "
                     f"{', '.join(ARCHITECTURES)}")  # fmt: skip
  return ARCHITECTURES[name]


def model_type(header: GgufHeader) -> str:
  """The model_type in transformers; llama.cpp calls Mistral and Mixtral llama."""
  architecture = gguf_architecture(header)
  if architecture.model_type == "llama" and header.settings.get("llama.expert_count"):
    return "mixtral"
  return "mistral" if header.settings.get("llama.attention.sliding_window") else architecture.model_type


def read_gguf_config(file: Path) -> dict[str, Any]:
  """Reads the config.json of the model in `file`. Raises InputError if the architecture is not supported."""
  with damage_reported(file, "a GGUF model"):
    return _config_of(read_gguf(file), file)


def _config_of(header: GgufHeader, file: Path) -> dict[str, Any]:
  architecture, name = gguf_architecture(header), header.settings["general.architecture"]
  given = {key.removeprefix(f"{name}."): value for key, value in header.settings.items()}
  config = {field: given[key] for key, field in FIELDS.items() if key in given}
  if "token_embd.weight" not in header.tensors:
    raise InputError(f"{file}: token_embd.weight is missing")
  config |= {
    "model_type": model_type(header),
    "vocab_size": header.tensors["token_embd.weight"].shape[0],
    "tie_word_embeddings": "output.weight" not in header.tensors,
    "attention_bias": "blk.0.attn_output.bias" in header.tensors,
    "mlp_bias": "blk.0.ffn_down.bias" in header.tensors,
    "rope_scaling": _rope_scaling(header, given),
  }
  if "hidden_size" in config and "num_attention_heads" in config:
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("query_pre_attn_scalar", _query_scale(config))
    if "rope.dimension_count" in given:
      config["partial_rotary_factor"] = given["rope.dimension_count"] / config["head_dim"]
  return dict(architecture.config) | config


def _query_scale(config: Mapping[str, Any]) -> int:
  """Gemma's query_pre_attn_scalar, which GGUF does not store. As in llama.cpp, the 27B models have another rule."""
  is_27b = (config["model_type"], config.get("num_hidden_layers")) in (("gemma2", 46), ("gemma3_text", 62))
  return int(config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"])


def _rope_scaling(header: GgufHeader, given: Mapping[str, Any]) -> dict[str, Any] | None:
  """The scaling of the rotary embedding, as in config.json.

  llama.cpp stores the factors of Llama 3.1 as a tensor; they are the factors of LongRoPE for contexts of any length.
  """
  original = given.get("rope.scaling.original_context_length")
  if ROPE_FREQUENCIES in header.tensors:
    factors = list(header.read_floats(ROPE_FREQUENCIES))
    length = given.get("context_length")
    return {"rope_type": "longrope", "short_factor": factors, "long_factor": factors, LENGTH: length,
            "attention_factor": 1.0}  # fmt: skip
  if LONG_FACTORS in header.tensors and SHORT_FACTORS in header.tensors:
    short, long = (list(header.read_floats(name)) for name in (SHORT_FACTORS, LONG_FACTORS))
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, LENGTH: original,
            "attention_factor": given.get("rope.scaling.attn_factor")}  # fmt: skip
  kind = given.get("rope.scaling.type", "none")
  if kind == "none":
    return None
  return {"rope_type": kind, "factor": given.get("rope.scaling.factor"), LENGTH: original}

"""Our settings as Hugging Face's config.json: the inverse of `hf.from_hf`, and held to it.

A file is made only where reading it gives the same settings again, so that transformers computes what was trained. The
layout is that of transformers 4 (rope_theta, rope_scaling, torch_dtype), which 5 and the other readers know too.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.config.schema import ArchConfig, ModelConfig
from lora_exp.models.hf_config import ACTIVATIONS, FULL, MODEL_TYPES, SIZES, SLIDING, from_hf

NAMED = {"gelu_tanh": "gelu_pytorch_tanh"}  # of the words for an activation the one that every class knows
GPT2_SIZES = {"layers": "n_layer", "width": "n_embd", "heads": "n_head", "ff": "n_inner", "max_len": "n_positions",
              "vocab_size": "vocab_size"}  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf(model: ModelConfig, vocab_size: int) -> dict[str, Any] | None:
  """config.json of `model` without its dtype and its tokens; None where no class of transformers computes it."""
  return next((made for kind in WRITERS if (made := _made(kind, model, vocab_size)) is not None), None)


def same_model(config: Mapping[str, Any], model: ModelConfig, vocab_size: int) -> bool:
  """Whether config.json `config` describes `model`, whose rows may be shorter than it allows, for its text alone."""
  if "ForConditionalGeneration" in str(config.get("architectures")):
    return False
  try:
    found = from_hf(config)
  except InputError:
    return False
  if found["family"] == "llama":  # no tensor has the length of the rows
    found["max_len"] = model.max_len
  return found == _fields(model, vocab_size)


def _fields(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
  """The fields that `from_hf` reads."""
  sizes = {name: getattr(model, name) for name in SIZES}
  return {"family": model.family, **sizes, "vocab_size": vocab_size, "arch": asdict(model.arch or ArchConfig())}


def _made(kind: str, model: ModelConfig, vocab_size: int) -> dict[str, Any] | None:
  arch = model.arch or ArchConfig()
  if (kind == "gpt2") != (model.family == "gpt2") or model.family not in ("gpt2", "llama"):
    return None
  sizes = {theirs: getattr(model, ours) for ours, theirs in (GPT2_SIZES if kind == "gpt2" else SIZES).items()}
  config = {"architectures": [MODEL_TYPES[kind]], "model_type": kind, **sizes, "vocab_size": vocab_size,
            "tie_word_embeddings": arch.tied, **dict.fromkeys(TOKENS)}  # fmt: skip
  try:
    config |= WRITERS[kind](model, arch)
    return config if from_hf(config) == _fields(model, vocab_size) else None
  except InputError:
    return None


def _gpt2(model: ModelConfig, arch: ArchConfig) -> dict[str, Any]:
  return {
    "activation_function": "gelu_new" if arch.activation == "gelu_tanh" else arch.activation,
    "layer_norm_epsilon": arch.norm_eps,
    **dict.fromkeys(("embd_pdrop", "resid_pdrop"), model.dropout), "attn_pdrop": 0.0,
  }  # fmt: skip


def _llama(model: ModelConfig, arch: ArchConfig) -> dict[str, Any]:
  return {
    "num_key_value_heads": arch.kv_heads, "head_dim": arch.head_dim, "hidden_act": _activation(arch),
    "rms_norm_eps": arch.norm_eps, "rope_theta": arch.rope_theta, "rope_scaling": _scaling(arch),
    "attention_bias": arch.out_bias, "mlp_bias": arch.mlp_bias,
  }  # fmt: skip


def _mistral(model: ModelConfig, arch: ArchConfig) -> dict[str, Any]:
  return _llama(model, arch) | {"sliding_window": arch.window}


def _qwen(model: ModelConfig, arch: ArchConfig) -> dict[str, Any]:
  if arch.window is None:
    return _llama(model, arch)
  windows = {"use_sliding_window": True, "sliding_window": arch.window, "max_window_layers": 0}
  return {**_llama(model, arch), **windows, "layer_types": _kinds(model, arch)}


def _gemma(model: ModelConfig, arch: ArchConfig) -> dict[str, Any]:
  return _llama(model, arch) | {"hidden_activation": _activation(arch)}


def _gemma3(model: ModelConfig, arch: ArchConfig) -> dict[str, Any]:
  return _gemma(model, arch) | {
    "rope_local_base_freq": arch.rope_local_theta, "query_pre_attn_scalar": _whole(arch.query_scale),
    "final_logit_softcapping": arch.logit_softcap, "attn_logit_softcapping": None,
    "sliding_window": arch.window or 4096, "layer_types": _kinds(model, arch),
  }  # fmt: skip


def _scaling(arch: ArchConfig) -> dict[str, Any] | None:
  length = "original_max_position_embeddings"
  return arch.rope_scaling and {name: _whole(x) if name == length else x for name, x in arch.rope_scaling.items()}


def _whole(x: float | None) -> int | None:
  """What transformers takes as a whole number alone."""
  if x is not None and x != int(x):
    raise InputError(f"{x} is not a whole number")
  return x if x is None else int(x)


def _activation(arch: ArchConfig) -> str:
  return NAMED.get(arch.activation, arch.activation)


def _kinds(model: ModelConfig, arch: ArchConfig) -> list[str]:
  full = range(model.layers) if arch.window is None else arch.full_layers or ()
  return [FULL if i in full else SLIDING for i in range(model.layers)]


WRITERS: dict[str, Callable[[ModelConfig, ArchConfig], dict[str, Any]]] = {  # the plainest first
  "gpt2": _gpt2, "llama": _llama, "mistral": _mistral, "qwen2": _qwen, "qwen3": _qwen, "gemma": _gemma,
  "gemma3_text": _gemma3,
}  # fmt: skip
assert set(NAMED.values()) <= set(ACTIVATIONS)

"""GGUF files of several architectures give the logits of the model of transformers that they were made from."""

import re
from pathlib import Path

import numpy as np
import pytest
from packs import quickly
from parity_models import ModelPair, loaded, our_logits
from transformers_models import CASES, LINEAR, headless, reference, sizes, their_logits, tokens_of

gguf = pytest.importorskip("gguf")
NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
# tensor of a block, without blk.N -> module in model.layers.N
LLAMA = {
  "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA = {**LLAMA, **NORMS, "ffn_norm": "pre_feedforward_layernorm"}
MODELS = {  # general.architecture -> (kind and arguments of transformers, names)
  "llama": ("Llama", sizes(30, 2, 5, 1, 14, 44, rope_parameters=LINEAR, attention_bias=True), LLAMA),
  "qwen2": (*CASES["qwen2"], LLAMA),
  "qwen3": (*CASES["qwen3"], LLAMA),
  "gemma2": ("Gemma2", {**CASES["gemma2"][1], "query_pre_attn_scalar": 14}, GEMMA),
  "gemma3": ("Gemma3Text", sizes(
    32, 2, 4, 2, 12, 40, sliding_window=5, query_pre_attn_scalar=12,
    rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 2000.0},
                     "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}), GEMMA),
  "olmo2": (*CASES["olmo2"], {**LLAMA, **NORMS}),
  "phi3": ("Phi3", headless(48, 2, 6, 2, 8, 36, sliding_window=5),
           {**LLAMA, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}),
  "mixtral": (*CASES["mixtral"], LLAMA),
  "qwen3moe": (*CASES["qwen3 moe"], LLAMA),
}  # fmt: skip
KEYS = {  # field of the configuration -> key of GGUF
  "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
  "moe_intermediate_size": "expert_feed_forward_length", "num_attention_heads": "attention.head_count",
  "num_key_value_heads": "attention.head_count_kv", "head_dim": "attention.key_length",
  "max_position_embeddings": "context_length", "sliding_window": "attention.sliding_window",
  "num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
}  # fmt: skip
FLOATS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "final_logit_softcapping": "final_logit_softcapping",
          "attn_logit_softcapping": "attn_logit_softcapping"}  # fmt: skip


def tensors_of(architecture: str, model, names: dict[str, str]) -> dict[str, np.ndarray]:
  """The tensors of `model` as llama.cpp stores them."""
  stored = {**{f"model.{new}": old for old, new in (("token_embd", "embed_tokens"), ("output_norm", "norm"))},
            "lm_head": "output"}  # fmt: skip
  modules, tensors, cfg = {module: name for name, module in names.items()}, {}, model.config
  for name, parameter in model.named_parameters():
    module, _, kind = name.rpartition(".")
    x, block = parameter.detach().numpy(), re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if "experts" in name:
      parts = {"ffn_down_exps": x} if "down" in name else dict(
        zip(("ffn_gate_exps", "ffn_up_exps"), np.split(x, 2, axis=1), strict=True))
      tensors |= {f"blk.{block[1]}.{part}.weight": value for part, value in parts.items()}
      continue
    if architecture in ("llama", "mixtral") and module.endswith(("q_proj", "k_proj")):
      heads = cfg.num_attention_heads if "q_proj" in module else cfg.num_key_value_heads
      x = np.stack(np.split(x.reshape(heads, -1, *x.shape[1:]), 2, axis=1), axis=2).reshape(x.shape)
    x = x + 1 if "gemma" in architecture and name.endswith("norm.weight") else x
    inner = module.removeprefix(f"model.layers.{block[1]}.") if block else ""
    new = f"blk.{block[1]}.{'ffn_gate_inp' if inner == 'mlp.gate' else modules[inner]}" if block else stored[module]
    tensors[f"{new}.{kind}"] = x
  return tensors


def write_gguf(at: Path, architecture: str, model, names: dict[str, str], kind: str = "F32") -> Path:
  """Writes `model` with its matrices as `kind`."""
  name, cfg = {"mixtral": "llama"}.get(architecture, architecture), model.config
  writer = gguf.GGUFWriter(at, name)
  for field, key in KEYS.items():
    value = getattr(cfg, field, None)
    if value is not None and not (field == "sliding_window" and name not in ("phi3", "gemma2", "gemma3")):
      writer.add_uint32(f"{name}.{key}", value)
  for field, key in FLOATS.items():
    if getattr(cfg, field, None) is not None:
      writer.add_float32(f"{name}.{key}", getattr(cfg, field))
  rotation = cfg.rope_parameters.get("full_attention", cfg.rope_parameters)
  writer.add_float32(f"{name}.rope.freq_base", rotation["rope_theta"])
  if rotation["rope_type"] == "linear":
    writer.add_string(f"{name}.rope.scaling.type", "linear")
    writer.add_float32(f"{name}.rope.scaling.factor", rotation["factor"])
  for tensor, x in tensors_of(architecture, model, names).items():
    quantised = gguf.GGMLQuantizationType[kind if x.ndim > 1 and x.shape[-1] % 32 == 0 else "F32"]
    writer.add_tensor(tensor, gguf.quants.quantize(np.ascontiguousarray(x), quantised), raw_dtype=quantised)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  return at


@pytest.fixture(autouse=True)
def quick():
  with quickly():
    yield


@pytest.mark.parametrize("architecture", MODELS)
def test_a_gguf_file_alone_is_the_model_it_was_made_from(tmp_path, architecture):
  kind, arguments, names = MODELS[architecture]
  theirs = reference(kind, arguments, 3)
  file = write_gguf(tmp_path / "model.gguf", architecture, theirs, names)
  tokens = tokens_of(5)
  logits, _ = our_logits(ModelPair(theirs, loaded(file, f"cache={tmp_path}")), tokens)
  np.testing.assert_allclose(logits, their_logits(theirs, tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "near"), [("F16", 2e-2), ("Q8_0", 0.2), ("Q4_0", 3.0)])
def test_a_quantised_gguf_file_is_near_the_model(tmp_path, kind, near):
  """Quantisation is exact to a known step; the bound tells a wrong order of rows or a wrong scale from it."""
  theirs = reference("Llama", sizes(64, 2, 4, 2, 16, 96), 3)
  file = write_gguf(tmp_path / "model.gguf", "llama", theirs, LLAMA, kind)
  tokens = tokens_of(5)
  logits, _ = our_logits(ModelPair(theirs, loaded(tmp_path, f"cache={tmp_path}")), tokens)
  errors = np.abs(logits - their_logits(theirs, tokens))
  assert 0 < errors.max() < near
  assert file.is_file()

"""config.json is read as transformers reads it: in both layouts, with the defaults of each class."""

import json
from copy import deepcopy

import numpy as np
import pytest

from lora_exp.models.hf_config import from_hf
from lora_exp.models.modules.rotary import frequencies

transformers = pytest.importorskip("transformers")
SMALL = {"num_hidden_layers": 5, "hidden_size": 48, "num_attention_heads": 6, "intermediate_size": 100,
         "vocab_size": 77}
GEMMA3 = {"num_hidden_layers": 7, "hidden_size": 48, "intermediate_size": 100}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"]
FILES = {
  "llama, nothing but sizes": ("llama", SMALL),
  "llama 2": ("llama", {**SMALL, "rms_norm_eps": 1e-5, "num_key_value_heads": 2, "max_position_embeddings": 99}),
  "llama 3, layout 4": ("llama", {**SMALL, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
  "llama 3, layout 5": ("llama", {**SMALL, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
  "llama, linear as once spelt": ("llama", {**SMALL, "rope_scaling": {"type": "linear", "factor": 2.0}}),
  "llama, null": ("llama", {**SMALL, "rope_scaling": None, "num_key_value_heads": None, "head_dim": None}),
  "llama, own head size and biases": ("llama", {**SMALL, "head_dim": 20, "attention_bias": True, "mlp_bias": True}),
  "llama, tied": ("llama", {**SMALL, "tie_word_embeddings": True, "hidden_act": "gelu"}),
  "mistral, nothing but sizes": ("mistral", {**SMALL, "num_key_value_heads": 3}),
  "mistral, defaults": ("mistral", {**SMALL, "num_attention_heads": 8}),
  "mistral, no window": ("mistral", {**SMALL, "num_key_value_heads": 3, "sliding_window": None, "rope_theta": 1e6}),
  "qwen2": ("qwen2", {**SMALL, "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": 9}),
  "qwen3": ("qwen3", {**SMALL, "num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}),
  "qwen3, windows": ("qwen3", {**SMALL, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9,
                               "max_window_layers": 3}),
  "qwen3, all have the window": ("qwen3", {**SMALL, "num_key_value_heads": 2, "use_sliding_window": True,
                                           "sliding_window": 9, "max_window_layers": 0}),
  "qwen3, layer types": ("qwen3", {**SMALL, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 9,
                                   "layer_types": KINDS}),
  "olmo2, nothing but its name": ("olmo2", {}),
  "olmo2": ("olmo2", {**SMALL, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 5e5,
                      "attention_bias": True}),
  "phi3, nothing but its name": ("phi3", {}),
  "phi3": ("phi3", {**SMALL, "sliding_window": 9, "rope_scaling": None, "tie_word_embeddings": True}),
  "phi3, longrope": ("phi3", {**SMALL, "max_position_embeddings": 128, "original_max_position_embeddings": 32,
                              "rope_scaling": {"type": "longrope", **FACTORS}}),
  "phi3, part of a head": ("phi3", {**SMALL, "partial_rotary_factor": 0.75, "rope_scaling": {
    "type": "longrope", "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.0]}}),
  "gemma, as released": ("gemma", {**SMALL, "num_attention_heads": 16, "hidden_act": "gelu", "hidden_activation": None,
                                   "rope_theta": 10000.0}),
  "gemma, one head": ("gemma", {**SMALL, "num_key_value_heads": 1, "head_dim": 10}),
  "gemma 3, nothing but sizes": ("gemma3_text", GEMMA3),
  "gemma 3, layout 4": ("gemma3_text", {**GEMMA3, "rope_theta": 123456.0, "rope_local_base_freq": 777.0,
                                        "sliding_window_pattern": 3, "query_pre_attn_scalar": 20, "sliding_window": 5,
                                        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                                        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
  "gemma 3, layout 5": ("gemma3_text", {**GEMMA3, "layer_types": [KINDS[1]] * 2 + [KINDS[0]] * 5, "rope_parameters": {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
  "gpt2, nothing but sizes": ("gpt2", {"n_layer": 3, "n_embd": 48, "n_head": 6, "vocab_size": 77}),
  "gpt2": ("gpt2", {"n_layer": 3, "n_embd": 48, "n_head": 6, "vocab_size": 77, "n_positions": 50, "n_inner": 100,
                    "activation_function": "relu", "layer_norm_epsilon": 1e-3, "tie_word_embeddings": False}),
}
ACTS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def expected_settings(cfg) -> dict:
  """What transformers' config object `cfg` says, as our settings."""
  name, heads, width = cfg.model_type, cfg.num_attention_heads, cfg.hidden_size
  act = getattr(cfg, "hidden_activation", None) or getattr(cfg, "hidden_act", None) or cfg.activation_function
  bias = {"gpt2": True, "qwen2": True}.get(name) or getattr(cfg, "attention_bias", False)
  return {
    "family": name.removesuffix("_text"), "layers": cfg.num_hidden_layers, "width": width, "heads": heads,
    "ff": (cfg.n_inner or 4 * width) if name == "gpt2" else cfg.intermediate_size,
    "max_len": cfg.max_position_embeddings, "vocab_size": cfg.vocab_size,
    "arch": {
      "kv_heads": getattr(cfg, "num_key_value_heads", heads),
      "head_dim": getattr(cfg, "head_dim", None) or width // heads,
      "norm_eps": cfg.layer_norm_epsilon if name == "gpt2" else cfg.rms_norm_eps,
      "norm_offset": "gemma" in name, "pre_norms": name != "olmo2", "post_norms": name in ("gemma3_text", "olmo2"),
      "qk_norm": name in ("qwen3", "gemma3_text", "olmo2"), "qk_norm_per_head": name != "olmo2",
      "activation": ACTS.get(act, act), "qkv_bias": bias, "out_bias": bias and name != "qwen2",
      "mlp_bias": name == "gpt2" or getattr(cfg, "mlp_bias", False), "tied": cfg.tie_word_embeddings,
      "embed_scale": "gemma" in name, "query_scale": getattr(cfg, "query_pre_attn_scalar", None),
      "attn_softcap": None,  # Gemma 3's code has attn_logit_softcapping and does not apply it
      "logit_softcap": getattr(cfg, "final_logit_softcapping", None), "options": None,
      **expected_rotation(cfg), **expected_windows(cfg),
    },
  }  # fmt: skip


def expected_rotation(cfg) -> dict:
  """The rotations of full and of windowed layers."""
  parameters = getattr(cfg, "rope_parameters", None) or {"rope_theta": 1e4}
  local, full = parameters.get("sliding_attention"), dict(parameters.get("full_attention", parameters))
  theta, part = full.pop("rope_theta"), full.pop("partial_rotary_factor", 1.0)
  full.pop("type", None)  # the former name of rope_type
  if full.get("rope_type") == "longrope":
    full["attention_factor"] = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"](cfg)[1]
  scaling = full if full.get("rope_type", "default") != "default" else None
  return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_theta": local and local["rope_theta"],
          "partial_rotary_factor": part}  # fmt: skip


def expected_windows(cfg) -> dict:
  """The window, and the layers without it."""
  usual = "sliding_attention" if getattr(cfg, "sliding_window", None) else "full_attention"
  kinds = getattr(cfg, "layer_types", None) or [usual] * cfg.num_hidden_layers
  window = getattr(cfg, "sliding_window", None) if "sliding_attention" in kinds else None
  full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
  return {"window": window, "full_layers": full if full and window else None}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("saved", [False, True])
def test_a_config_is_read_as_transformers_reads_it(name, saved):
  """The file as it is, and as transformers saves it again, in its own layout."""
  model_type, file = FILES[name]
  cfg = transformers.CONFIG_MAPPING[model_type](**deepcopy(file))  # it adds to what it is given
  assert from_hf(cfg.to_dict() if saved else {"model_type": model_type, **file}) == expected_settings(cfg)


def test_the_text_config_of_gemma_3_with_vision():
  cfg = transformers.Gemma3Config(text_config={**GEMMA3, "sliding_window": 5})
  file = {**cfg.to_dict(), "architectures": ["Gemma3ForConditionalGeneration"]}
  assert from_hf(file) == expected_settings(cfg.text_config)
  del file["text_config"]["vocab_size"]
  assert from_hf(file)["vocab_size"] == 262_208


OUTSIDE = {
  "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
  "yarn": {"type": "yarn", "factor": 4.0},
  "longrope": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
  "dynamic": {"type": "dynamic", "factor": 2.0},
}


@pytest.mark.parametrize("inside", [None, 32])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_an_outer_original_length_counts_as_in_transformers(kind, inside, tmp_path):
  """The frequencies at 50 positions are equal; `dynamic` ignores the field."""
  torch = pytest.importorskip("torch")
  scaling = OUTSIDE[kind] | ({} if inside is None else {"original_max_position_embeddings": inside})
  file = {"model_type": "llama", **SMALL, "max_position_embeddings": 64, "rope_scaling": scaling,
          "original_max_position_embeddings": 16}
  (tmp_path / "config.json").write_text(json.dumps(file))
  cfg = transformers.LlamaConfig.from_pretrained(str(tmp_path))
  theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(cfg)
  theirs(torch.zeros(1, 50, 8), torch.arange(50)[None])
  arch = from_hf(file)["arch"]
  ours, factor = frequencies(8, arch["rope_theta"], arch["rope_scaling"], 50)
  np.testing.assert_allclose(ours, theirs.inv_freq.numpy(), rtol=1e-5)
  assert float(factor) == pytest.approx(theirs.attention_scaling)

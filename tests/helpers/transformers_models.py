"""Tiny random models of transformers for every family, their logits, and those of a run of ours."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_exp.cli import main as entry
from lora_exp.runtime.saved_config import load_config
from lora_exp.train.compute.program import assemble
from lora_exp.train.loaded_run import open_run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 24  # tokens of a row: more than every window, and than the original context of scaled rotations
VOCAB = 263  # more than the byte tokenizer has
LLAMA3 = {
  "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
  "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 800.0, "factor": 2.0}
LOCAL = {"rope_type": "default", "rope_theta": 50.0}
LONGROPE = {
  "rope_type": "longrope", "rope_theta": 700.0, "short_factor": [1.0, 1.5, 2.0], "long_factor": [1.2, 3.0, 9.0],
  "partial_rotary_factor": 0.75,
}  # fmt: skip


def sizes(width: int, layers: int, heads: int, kv_heads: int, head_dim: int, ff: int, **more: Any) -> dict[str, Any]:
  """Arguments of a transformers configuration: sizes, and `more` of its fields."""
  return {
    "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
    "num_key_value_heads": kv_heads, "head_dim": head_dim, "intermediate_size": ff, **more,
  }  # fmt: skip


def headless(*args: int, **more: Any) -> dict[str, Any]:
  """`sizes` of a class whose heads fill the width."""
  return {key: value for key, value in sizes(*args, **more).items() if key != "head_dim"}


def gpt2(width: int, layers: int, heads: int, ff: int | None, **more: Any) -> dict[str, Any]:
  """`sizes` under GPT-2's names."""
  return {"n_embd": width, "n_layer": layers, "n_head": heads, "n_inner": ff, **more}


def gemma3(pattern: str, wide: dict[str, Any], **more: Any) -> dict[str, Any]:
  """Fields of Gemma 3: for each letter of `pattern` a layer without a window (F) or with one (S)."""
  kinds = [{"F": "full_attention", "S": "sliding_attention"}[kind] for kind in pattern]
  return {"layer_types": kinds, "rope_parameters": {"full_attention": wide, "sliding_attention": LOCAL}, **more}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "gpt2": ("GPT2", gpt2(36, 3, 3, None)),
  "gpt2 other": ("GPT2", gpt2(
    40, 2, 5, 52, tie_word_embeddings=False, activation_function="relu", layer_norm_epsilon=1e-2)),
  "llama": ("Llama", sizes(32, 2, 4, 4, 8, 48)),
  "llama 3": ("Llama", sizes(
    42, 3, 6, 3, 10, 56, rope_parameters=LLAMA3, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3)),
  "llama tied": ("Llama", sizes(
    30, 2, 5, 1, 14, 44, rope_parameters=LINEAR, tie_word_embeddings=True, hidden_act="gelu")),
  "llama yarn": ("Llama", sizes(32, 2, 4, 2, 12, 48, rope_parameters=YARN)),
  "llama dynamic": ("Llama", sizes(32, 2, 4, 2, 12, 48, rope_parameters=DYNAMIC, max_position_embeddings=16)),
  "llama longrope": ("Llama", sizes(
    30, 2, 3, 1, 6, 44, original_max_position_embeddings=32, rope_parameters={
      **LONGROPE, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 16})),
  "qwen2 yarn": ("Qwen2", headless(48, 2, 6, 2, 8, 36, rope_parameters={**YARN, **MSCALE})),
  "mistral": ("Mistral", sizes(36, 3, 4, 2, 14, 40, sliding_window=5)),
  "mistral 0.3": ("Mistral", sizes(24, 2, 6, 2, 4, 60, sliding_window=None)),
  "qwen2": ("Qwen2", headless(48, 2, 6, 2, 8, 36)),
  "qwen3": ("Qwen3", sizes(28, 3, 6, 2, 10, 40, tie_word_embeddings=True)),
  "qwen3 window": ("Qwen3", sizes(
    32, 3, 5, 5, 6, 40, attention_bias=True, use_sliding_window=True, sliding_window=6, max_window_layers=1)),
  "mixtral": ("Mixtral", headless(36, 2, 6, 3, 6, 20, num_local_experts=5, num_experts_per_tok=2)),
  "mixtral other": ("Mixtral", headless(
    30, 2, 5, 1, 6, 14, num_local_experts=3, num_experts_per_tok=3, sliding_window=6, tie_word_embeddings=True,
    rope_parameters=LINEAR)),
  "qwen3 moe": ("Qwen3Moe", sizes(
    28, 2, 6, 2, 10, 40, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=11, norm_topk_prob=True)),
  "qwen3 moe other": ("Qwen3Moe", sizes(
    32, 2, 4, 4, 6, 40, num_experts=4, num_experts_per_tok=1, moe_intermediate_size=18, attention_bias=True,
    use_sliding_window=True, sliding_window=5)),
  "qwen3 moe dense": ("Qwen3Moe", sizes(
    32, 4, 4, 2, 6, 27, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=18, mlp_only_layers=[1],
    decoder_sparse_step=2)),
  "olmo2": ("Olmo2", headless(40, 3, 5, 5, 8, 36, rms_norm_eps=1e-3)),
  "olmo2 other": ("Olmo2", headless(
    36, 2, 6, 2, 6, 44, rope_parameters=LINEAR, attention_bias=True, tie_word_embeddings=True)),
  "phi3": ("Phi3", headless(48, 3, 6, 2, 8, 36, sliding_window=5)),
  "phi3 longrope": ("Phi3", headless(
    32, 2, 4, 4, 8, 40, rope_parameters=LONGROPE, original_max_position_embeddings=16, tie_word_embeddings=True)),
  "phi3 short": ("Phi3", headless(
    32, 2, 4, 1, 8, 40, rope_parameters=LONGROPE, original_max_position_embeddings=32)),
  "gemma": ("Gemma", sizes(24, 2, 3, 1, 16, 40)),
  "gemma 7b": ("Gemma", sizes(32, 3, 4, 4, 10, 56, hidden_act="gelu_pytorch_tanh")),
  "gemma2": ("Gemma2", sizes(36, 3, 4, 2, 14, 44, sliding_window=5, query_pre_attn_scalar=9)),
  "gemma2 other": ("Gemma2", sizes(
    30, 2, 3, 1, 10, 36, sliding_window=7, query_pre_attn_scalar=10, attn_logit_softcapping=1.5,
    final_logit_softcapping=3.0, tie_word_embeddings=False,
    layer_types=["full_attention", "sliding_attention"])),
  "gemma3": ("Gemma3Text", sizes(
    32, 4, 4, 2, 12, 40, sliding_window=5, query_pre_attn_scalar=7, **gemma3("SFSF", {**LOCAL, "rope_theta": 2000.0}))),
  "gemma3 capped": ("Gemma3Text", sizes(
    30, 3, 6, 1, 6, 36, sliding_window=9, query_pre_attn_scalar=20,
    final_logit_softcapping=4.0, **gemma3("SSF", LINEAR))),
  "gemma3 local": ("Gemma3Text", sizes(
    20, 2, 2, 2, 8, 36, sliding_window=4, query_pre_attn_scalar=8, tie_word_embeddings=False, **gemma3("SS", LINEAR))),
}  # fmt: skip


def reference(kind: str, arguments: dict[str, Any], seed: int):
  """A model of transformers with random parameters at which every parameter changes the logits."""
  arguments = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | arguments
  places = {"n_positions" if kind == "GPT2" else "max_position_embeddings": 64}
  cfg = getattr(transformers, f"{kind}Config")(**(places | arguments), attn_implementation="eager")
  names = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
  model = getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(cfg).eval()
  cfg._experts_implementation = "eager"  # the grouped product of torch refuses odd sizes
  draw = torch.Generator().manual_seed(seed)
  for name, x in model.named_parameters():
    noise = torch.randn(x.shape, generator=draw)
    if x.ndim == 1:
      x.data += 0.3 * noise
    else:
      x.data = noise * (0.5 if "emb" in name or "wte" in name or "wpe" in name else x.shape[-1] ** -0.5)
  return model


def tokens_of(seed: int, batch: int = 2) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, VOCAB, (batch, LENGTH), dtype=np.int32)


def their_logits(model, tokens: np.ndarray, **more) -> np.ndarray:
  with torch.no_grad():
    return model(torch.tensor(tokens, dtype=torch.long), **more).logits.numpy()


def run_logits(run_dir: Path, tokens: np.ndarray) -> np.ndarray:
  """Logits (B, T, V) of the run in `run_dir`, by the adapter in its directory."""
  cfg = load_config(str(run_dir))
  cfg.run, cfg.task = str(run_dir), "evaluate"
  run = open_run(cfg)
  call = lambda params, trial, frozen: assemble(run.job.program, params, trial, frozen, None)(jnp.asarray(tokens))
  return np.asarray(jax.jit(call)(*run.single(), run.frozen))


def exported(run_dir: Path, *argv: str, out: str) -> Path:
  assert entry.run([*argv, f"run={run_dir}"]) == 0
  return run_dir / "export" / out

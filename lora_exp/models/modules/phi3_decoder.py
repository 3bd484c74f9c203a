"""Phi-3's decoder: Llama's with one fused kernel for queries, keys and values, and one for gates and features.

The kernels stay fused, as in transformers, because a PEFT adapter for Phi-3 has a single A and B for `qkv_proj`. No
adapter of three separate kernels is equivalent.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.modules.llama_decoder import Llama, LlamaAttention, LlamaLayer, LlamaMLP

Array = jax.Array


class Phi3Attention(LlamaAttention):
  """Rotary attention. The outputs of `qkv_proj` are the concatenated queries, keys and values."""

  def _make_projections(self, cfg: ModelConfig, arch: ArchConfig, **options: Any) -> None:
    queries, keys = cfg.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    self.bounds = (queries, queries + keys)
    self.qkv_proj = nnx.Linear(cfg.width, queries + 2 * keys, use_bias=arch.qkv_bias, **options)
    self.o_proj = nnx.Linear(queries, cfg.width, use_bias=arch.out_bias, **options)

  def project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
    """Queries (B, T, H·h), keys and values (B, T, K·h)."""
    q, k, v = jnp.split(self.qkv_proj(x_BTD), self.bounds, axis=-1)
    return q, k, v


class Phi3MLP(LlamaMLP):
  """down(act(gate)·up), where the outputs of `gate_up_proj` are gate and up, concatenated."""

  def _make_projections(self, cfg: ModelConfig, arch: ArchConfig, **options: Any) -> None:
    self.gate_up_proj = nnx.Linear(cfg.width, 2 * cfg.ff, use_bias=arch.mlp_bias, **options)
    self.down_proj = nnx.Linear(cfg.ff, cfg.width, use_bias=arch.mlp_bias, **options)

  def project(self, x_BTD: Array) -> tuple[Array, Array]:
    """Gates and features, both (B, T, F)."""
    gate, features = jnp.split(self.gate_up_proj(x_BTD), 2, axis=-1)
    return gate, features


class Phi3Layer(LlamaLayer):
  """Llama's layer with fused kernels."""

  attention_type = Phi3Attention
  mlp_type = Phi3MLP


class Phi3(Llama):
  """Llama with fused kernels."""

  layer_type = Phi3Layer

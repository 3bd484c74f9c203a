"""GPT-2's decoder: learned positions, pre-norm blocks, one fused kernel for queries, keys and values.

As in GPT-2, dropout follows the embeddings, attention and feed-forward; there is none on attention probabilities.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.modules.attention import (
  ACTIVATIONS,
  Cache,
  attend,
  empty_cache,
  fill_cache,
  run_blocks,
  split_heads,
)
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.dropout import Dropout

Array = jax.Array


class GPT2Attention(nnx.Module):
  """Multi-head attention; `c_attn` (D, 3·D) computes queries, keys and values."""

  def __init__(self, cfg: ModelConfig, *, out_init: Any, rngs: nnx.Rngs, **dtypes: Any):
    init = nnx.initializers.normal(0.02)
    self.heads = cfg.heads
    self.c_attn = nnx.Linear(cfg.width, 3 * cfg.width, kernel_init=init, rngs=rngs, **dtypes)
    self.c_proj = nnx.Linear(cfg.width, cfg.width, kernel_init=out_init, rngs=rngs, **dtypes)
    self.resid_dropout = Dropout(cfg.dropout)

  def __call__(
    self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot: Array | int
  ) -> tuple[Array, Cache | None]:
    q, k, v = (split_heads(y, self.heads, -1) for y in jnp.split(self.c_attn(x_BTD), 3, axis=-1))
    if cache is not None:
      cache = fill_cache(cache, k, v, slot)
      k, v = cache["key"], cache["value"]
    y_BTD = attend(q, k, v, mask_BTS).reshape(x_BTD.shape)
    return self.resid_dropout(self.c_proj(y_BTD)), cache


class GPT2MLP(nnx.Module):
  """c_proj(act(c_fc(x)))."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, *, out_init: Any, rngs: nnx.Rngs, **dtypes: Any):
    self.activation = arch.activation
    self.c_fc = nnx.Linear(cfg.width, cfg.ff, kernel_init=nnx.initializers.normal(0.02), rngs=rngs, **dtypes)
    self.c_proj = nnx.Linear(cfg.ff, cfg.width, kernel_init=out_init, rngs=rngs, **dtypes)
    self.dropout = Dropout(cfg.dropout)

  def __call__(self, x_BTD: Array) -> Array:
    return self.dropout(self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x_BTD))))


class GPT2Block(nnx.Module):
  """x += attention(norm(x)); x += mlp(norm(x)). Residual projections have a smaller initial scale in deeper models."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, *, rngs: nnx.Rngs, **dtypes: Any):
    out_init = nnx.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)
    self.ln_1, self.ln_2 = layer_norm(cfg, arch, rngs=rngs, **dtypes), layer_norm(cfg, arch, rngs=rngs, **dtypes)
    self.attn = GPT2Attention(cfg, out_init=out_init, rngs=rngs, **dtypes)
    self.mlp = GPT2MLP(cfg, arch, out_init=out_init, rngs=rngs, **dtypes)

  def __call__(
    self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot: Array | int
  ) -> tuple[Array, Cache | None]:
    y, cache = self.attn(self.ln_1(x_BTD), mask_BTS, cache, slot)
    x_BTD = x_BTD + y
    return x_BTD + self.mlp(self.ln_2(x_BTD)), cache


def layer_norm(cfg: ModelConfig, arch: ArchConfig, **options: Any) -> nnx.LayerNorm:
  """A layer norm that avoids E[x²] − E[x]²: GPT-2 has features in the thousands, which would cancel."""
  return nnx.LayerNorm(cfg.width, epsilon=arch.norm_eps, use_fast_variance=False, **options)


class GPT2(LanguageModel):
  """Maps token ids to features (`hidden`); the head is the token embedding or, if untied, `lm_head`."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    arch = cfg.arch or ArchConfig()
    options: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype), "rngs": rngs}
    init = nnx.initializers.normal(0.02)
    self.heads, self.remat = cfg.heads, cfg.remat
    self.wte = nnx.Embed(vocab_size, cfg.width, embedding_init=init, **options)
    self.wpe = nnx.Embed(cfg.max_len, cfg.width, embedding_init=init, **options)
    self.drop = Dropout(cfg.dropout)
    self.h = nnx.List([GPT2Block(cfg, arch, **options) for _ in range(cfg.layers)])
    self.ln_f = layer_norm(cfg, arch, **options)
    self.lm_head = None if arch.tied else nnx.Linear(cfg.width, vocab_size, use_bias=False, kernel_init=init, **options)

  @property
  def head(self) -> nnx.Linear | nnx.Embed:
    """The vocabulary projection."""
    return self.wte if self.lm_head is None else self.lm_head

  def hidden(
    self, tokens_BT: Array, positions_BT: Array, mask_BTS: Array, cache: Any = None, slot: Any = 0
  ) -> tuple[Array, list[Cache | None]]:
    """Features (B, T, D) before the head, and the cache of each block (None without one)."""
    x_BTD = self.drop(self.wte(tokens_BT) + self.wpe(positions_BT))
    x_BTD, caches = run_blocks(self.h, x_BTD, [mask_BTS] * len(self.h), cache, slot, self.remat)
    return self.ln_f(x_BTD), caches

  def empty_cache(self, batch: int, slots: int) -> list[Cache]:
    """A cache of zeros for `slots` positions in each block."""
    return empty_cache(len(self.h), batch, slots, self.heads, self.wte.features // self.heads, self.wte.dtype)

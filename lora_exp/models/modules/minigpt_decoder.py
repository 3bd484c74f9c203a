"""MiniGPT's decoder: learned positions, post-norm blocks, ReLU, an untied output layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.modules.attention import Cache, attend, empty_cache, fill_cache, run_blocks, split_heads
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime.dropout import Dropout

Array = jax.Array


class MiniGPTAttention(nnx.Module):
  """Multi-head attention with kernels (D, H·h): paths `query`, `key`, `value`, `out`."""

  def __init__(self, width: int, heads: int, **options: Any):
    self.heads = heads
    self.query = nnx.Linear(width, width, **options)
    self.key = nnx.Linear(width, width, **options)
    self.value = nnx.Linear(width, width, **options)
    self.out = nnx.Linear(width, width, **options)

  def __call__(
    self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot: Array | int
  ) -> tuple[Array, Cache | None]:
    q, k, v = (split_heads(layer(x_BTD), self.heads, -1) for layer in (self.query, self.key, self.value))
    if cache is not None:
      cache = fill_cache(cache, k, v, slot)
      k, v = cache["key"], cache["value"]
    return self.out(attend(q, k, v, mask_BTS).reshape(x_BTD.shape)), cache


class MiniGPTBlock(nnx.Module):
  """x = norm(x + attention(x)); x = norm(x + linear2(relu(linear1(x))))."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    init = nnx.initializers.xavier_uniform()
    self.mha = MiniGPTAttention(cfg.width, cfg.heads, **dtypes, kernel_init=init, rngs=rngs)
    self.dropout1 = Dropout(cfg.dropout)
    self.layer_norm1 = nnx.LayerNorm(cfg.width, **dtypes, rngs=rngs)
    self.linear1 = nnx.Linear(cfg.width, cfg.ff, **dtypes, kernel_init=init, rngs=rngs)
    self.linear2 = nnx.Linear(cfg.ff, cfg.width, **dtypes, kernel_init=init, rngs=rngs)
    self.dropout2 = Dropout(cfg.dropout)
    self.layer_norm2 = nnx.LayerNorm(cfg.width, **dtypes, rngs=rngs)

  def __call__(
    self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot: Array | int
  ) -> tuple[Array, Cache | None]:
    y, cache = self.mha(x_BTD, mask_BTS, cache, slot)
    x_BTD = self.layer_norm1(x_BTD + self.dropout1(y))
    y = self.linear2(nnx.relu(self.linear1(x_BTD)))
    return self.layer_norm2(x_BTD + self.dropout2(y)), cache


class MiniGPT(LanguageModel):
  """Maps token ids to features (`hidden`) and features to logits (`output_layer`)."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    self.heads, self.remat, self.max_len = cfg.heads, cfg.remat, cfg.max_len
    self.token_emb = nnx.Embed(vocab_size, cfg.width, **dtypes, rngs=rngs)
    self.pos_emb = nnx.Embed(cfg.max_len, cfg.width, **dtypes, rngs=rngs)
    self.blocks = nnx.List([MiniGPTBlock(cfg, rngs=rngs) for _ in range(cfg.layers)])
    init = nnx.initializers.xavier_uniform()
    self.output_layer = nnx.Linear(cfg.width, vocab_size, **dtypes, kernel_init=init, rngs=rngs)

  @property
  def head(self) -> nnx.Linear:
    """The vocabulary projection."""
    return self.output_layer

  def hidden(
    self, tokens_BT: Array, positions_BT: Array, mask_BTS: Array, cache: Any = None, slot: Any = 0
  ) -> tuple[Array, list[Cache | None]]:
    """Features (B, T, D) before the head, and the cache of each block (None without one)."""
    x_BTD = self.token_emb(tokens_BT) + self.pos_emb(positions_BT)
    return run_blocks(self.blocks, x_BTD, [mask_BTS] * len(self.blocks), cache, slot, self.remat)

  def empty_cache(self, batch: int, slots: int) -> list[Cache]:
    """A cache of zeros for `slots` positions in each block."""
    head_dim = self.token_emb.features // self.heads
    return empty_cache(len(self.blocks), batch, slots, self.heads, head_dim, self.output_layer.dtype)

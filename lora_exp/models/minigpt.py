"""MiniGPT of the JAX AI stack's tutorial: learned positions, post-norm blocks with ReLU, an untied output layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.family import Family, LanguageModel
from lora_exp.models.layers import Attention, Cache, empty_cache, run_blocks
from lora_exp.runtime.dropout import Dropout

Array = jax.Array


class Block(nnx.Module):
  """x = norm(x + attention(x)); x = norm(x + linear2(relu(linear1(x))))."""

  def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    init = nnx.initializers.xavier_uniform()
    self.mha = Attention(cfg.width, cfg.heads, **dtypes, kernel_init=init, rngs=rngs)
    self.dropout1 = Dropout(cfg.dropout)
    self.layer_norm1 = nnx.LayerNorm(cfg.width, **dtypes, rngs=rngs)
    self.linear1 = nnx.Linear(cfg.width, cfg.ff, **dtypes, kernel_init=init, rngs=rngs)
    self.linear2 = nnx.Linear(cfg.ff, cfg.width, **dtypes, kernel_init=init, rngs=rngs)
    self.dropout2 = Dropout(cfg.dropout)
    self.layer_norm2 = nnx.LayerNorm(cfg.width, **dtypes, rngs=rngs)

  def __call__(self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot) -> tuple[Array, Cache | None]:
    y, cache = self.mha(x_BTD, mask_BTS, cache, slot)
    x_BTD = self.layer_norm1(x_BTD + self.dropout1(y))
    y = self.linear2(nnx.relu(self.linear1(x_BTD)))
    return self.layer_norm2(x_BTD + self.dropout2(y)), cache


class MiniGPT(LanguageModel):
  """Tokens to features (`hidden`) and features to logits (`output_layer`), apart so that the loss can be chunked."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    self.heads, self.remat, self.max_len = cfg.heads, cfg.remat, cfg.max_len
    self.token_emb = nnx.Embed(vocab_size, cfg.width, **dtypes, rngs=rngs)
    self.pos_emb = nnx.Embed(cfg.max_len, cfg.width, **dtypes, rngs=rngs)
    self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.layers)])
    init = nnx.initializers.xavier_uniform()
    self.output_layer = nnx.Linear(cfg.width, vocab_size, **dtypes, kernel_init=init, rngs=rngs)

  @property
  def head(self) -> nnx.Linear:
    """The vocabulary projection."""
    return self.output_layer

  def hidden(self, tokens_BT: Array, positions_BT: Array, mask_BTS: Array, cache=None, slot=0) -> tuple[Array, list]:
    """Features (B, T, D) before the head, and the cache of each block (None without one)."""
    x_BTD = self.token_emb(tokens_BT) + self.pos_emb(positions_BT)
    return run_blocks(self.blocks, x_BTD, [mask_BTS] * len(self.blocks), cache, slot, self.remat)

  def empty_cache(self, batch: int, slots: int) -> list[Cache]:
    """A cache of zeros for `slots` positions in each block."""
    head_dim = self.token_emb.features // self.heads
    return empty_cache(len(self.blocks), batch, slots, self.heads, head_dim, self.output_layer.dtype)


FAMILY = Family(
  build=MiniGPT,
  presets={
    "attention": ("mha.*",),
    "qv": ("mha.query", "mha.value"),
    "mlp": ("linear1", "linear2"),
    "all_linear": ("mha.*", "linear1", "linear2"),
    "embeddings": ("token_emb", "pos_emb"),
    "head": ("output_layer",),
  },
  axes={
    "token_emb.embedding": ("vocab", "embed"),
    "mha.query.kernel": ("embed", "heads"),
    "mha.key.kernel": ("embed", "heads"),
    "mha.value.kernel": ("embed", "heads"),
    "mha.out.kernel": ("heads", "embed"),
    "mha.query.bias": ("heads",),
    "mha.key.bias": ("heads",),
    "mha.value.bias": ("heads",),
    "linear1.kernel": ("embed", "mlp"),
    "linear1.bias": ("mlp",),
    "linear2.kernel": ("mlp", "embed"),
    "output_layer.kernel": ("embed", "vocab"),
    "output_layer.bias": ("vocab",),
  },
  units=lambda cfg: {"heads": cfg.heads},
)

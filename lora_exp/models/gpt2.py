"""GPT-2, small to XL: learned positions, pre-norm blocks, one fused kernel for queries, keys and values, a tied head.

Paths are those of Hugging Face's code without `transformer.`: `h.0.attn.c_attn`, `h.0.mlp.c_proj`, `wte`, `ln_f`.
Dropout is GPT-2's after the embeddings, attention and feed-forward; attention probabilities are not dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.family import Family, LanguageModel, Names
from lora_exp.models.layers import ACTIVATIONS, Cache, attend, empty_cache, fill_cache, run_blocks
from lora_exp.runtime.dropout import Dropout

Array = jax.Array


class Attention(nnx.Module):
  """Multi-head attention; `c_attn` gives queries, keys and values side by side (D, 3·D)."""

  def __init__(self, cfg: ModelConfig, *, out_init, rngs: nnx.Rngs, **made: Any):
    self.heads = cfg.heads
    self.c_attn = nnx.Linear(cfg.width, 3 * cfg.width, kernel_init=nnx.initializers.normal(0.02), rngs=rngs, **made)
    self.c_proj = nnx.Linear(cfg.width, cfg.width, kernel_init=out_init, rngs=rngs, **made)
    self.resid_dropout = Dropout(cfg.dropout)

  def __call__(self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot) -> tuple[Array, Cache | None]:
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)
    q, k, v = map(split, jnp.split(self.c_attn(x_BTD), 3, axis=-1))
    if cache is not None:
      cache = fill_cache(cache, k, v, slot)
      k, v = cache["key"], cache["value"]
    return self.resid_dropout(self.c_proj(attend(q, k, v, mask_BTS).reshape(x_BTD.shape))), cache


class MLP(nnx.Module):
  """c_proj(act(c_fc(x)))."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, *, out_init, rngs: nnx.Rngs, **made: Any):
    self.activation = arch.activation
    self.c_fc = nnx.Linear(cfg.width, cfg.ff, kernel_init=nnx.initializers.normal(0.02), rngs=rngs, **made)
    self.c_proj = nnx.Linear(cfg.ff, cfg.width, kernel_init=out_init, rngs=rngs, **made)
    self.dropout = Dropout(cfg.dropout)

  def __call__(self, x: Array) -> Array:
    return self.dropout(self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x))))


class Block(nnx.Module):
  """x += attention(norm(x)); x += mlp(norm(x)). What is added starts the smaller the more blocks there are."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, *, rngs: nnx.Rngs, **made: Any):
    out_init = nnx.initializers.normal(0.02 / (2 * cfg.layers) ** 0.5)
    self.ln_1, self.ln_2 = norm(cfg, arch, rngs=rngs, **made), norm(cfg, arch, rngs=rngs, **made)
    self.attn = Attention(cfg, out_init=out_init, rngs=rngs, **made)
    self.mlp = MLP(cfg, arch, out_init=out_init, rngs=rngs, **made)

  def __call__(self, x_BTD: Array, mask_BTS: Array, cache: Cache | None, slot) -> tuple[Array, Cache | None]:
    y, cache = self.attn(self.ln_1(x_BTD), mask_BTS, cache, slot)
    x_BTD = x_BTD + y
    return x_BTD + self.mlp(self.ln_2(x_BTD)), cache


def norm(cfg: ModelConfig, arch: ArchConfig, **made: Any) -> nnx.LayerNorm:
  """A layer norm. Its variance is not E[x²] - E[x]²: GPT-2 has features in the thousands, which would cancel."""
  return nnx.LayerNorm(cfg.width, epsilon=arch.norm_eps, use_fast_variance=False, **made)


class GPT2(LanguageModel):
  """Tokens to features (`hidden`); the head is the token embedding or, untied, `lm_head`."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    arch = cfg.arch or ArchConfig()
    made: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype), "rngs": rngs}
    init = nnx.initializers.normal(0.02)
    self.heads, self.remat = cfg.heads, cfg.remat
    self.wte = nnx.Embed(vocab_size, cfg.width, embedding_init=init, **made)
    self.wpe = nnx.Embed(cfg.max_len, cfg.width, embedding_init=init, **made)
    self.drop = Dropout(cfg.dropout)
    self.h = nnx.List([Block(cfg, arch, **made) for _ in range(cfg.layers)])
    self.ln_f = norm(cfg, arch, **made)
    self.lm_head = None if arch.tied else nnx.Linear(cfg.width, vocab_size, use_bias=False, kernel_init=init, **made)

  @property
  def head(self) -> nnx.Linear | nnx.Embed:
    """The vocabulary projection."""
    return self.wte if self.lm_head is None else self.lm_head

  def hidden(
    self, tokens_BT: Array, positions_BT: Array, mask_BTS: Array, cache: Any = None, slot: Any = 0
  ) -> tuple[Array, list]:
    """Features (B, T, D) before the head, and the cache of each block (None without one)."""
    x_BTD = self.drop(self.wte(tokens_BT) + self.wpe(positions_BT))
    x_BTD, caches = run_blocks(self.h, x_BTD, [mask_BTS] * len(self.h), cache, slot, self.remat)
    return self.ln_f(x_BTD), caches

  def empty_cache(self, batch: int, slots: int) -> list[Cache]:
    """A cache of zeros for `slots` positions in each block."""
    return empty_cache(len(self.h), batch, slots, self.heads, self.wte.features // self.heads, self.wte.dtype)


ATTENTION = ("attn.c_attn", "attn.c_proj")
FEED_FORWARD = ("mlp.c_fc", "mlp.c_proj")
FAMILY = Family(
  build=GPT2,
  presets={
    "attention": ATTENTION,
    "qv": ("attn.c_attn",),  # fused: the keys are adapted with them
    "mlp": FEED_FORWARD,
    "all_linear": (*ATTENTION, *FEED_FORWARD),
    "embeddings": ("wte", "wpe"),
    "head": ("lm_head",),
  },
  axes={
    "wte.embedding": ("vocab", "embed"),
    "wpe.embedding": (None, "embed"),
    "attn.c_attn.kernel": ("embed", "heads"),
    "attn.c_attn.bias": ("heads",),
    "attn.c_proj.kernel": ("heads", "embed"),
    "mlp.c_fc.kernel": ("embed", "mlp"),
    "mlp.c_fc.bias": ("mlp",),
    "mlp.c_proj.kernel": ("mlp", "embed"),
    "lm_head.kernel": ("embed", "vocab"),
  },
  units=lambda cfg: {"heads": cfg.heads},
  names=Names(prefix="transformer.", transposed=False, ignore=(r".*\.attn\.(masked_)?bias", r"lm_head\.weight")),
)

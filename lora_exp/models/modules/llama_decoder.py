"""The decoder of Llama, Mistral, Qwen, Gemma and OLMo-2. They share one layer, configured by `ArchConfig`."""

import math
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
from lora_exp.models.modules.rotary import PositionView, position_views, rotate

Array = jax.Array


class RMSNorm(nnx.Module):
  """x/rms(x) in float32, times `scale`; with `norm_offset`, times 1 + scale."""

  def __init__(self, features: int, arch: ArchConfig, *, param_dtype: Any):
    self.eps, self.offset = arch.norm_eps, arch.norm_offset
    self.scale = nnx.Param((jnp.zeros if arch.norm_offset else jnp.ones)(features, param_dtype))

  def __call__(self, x: Array) -> Array:
    wide, scale = x.astype(jnp.float32), self.scale[...]
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.eps)
    if self.offset:
      return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class LlamaAttention(nnx.Module):
  """Rotary attention in which H/K query heads share a key/value head."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **options: Any):
    self.head_dim, self.softcap = arch.head_dim, arch.attn_softcap
    self.scale = (arch.query_scale or arch.head_dim) ** -0.5
    self.norm_per_head = arch.qk_norm_per_head
    self._make_projections(cfg, arch, **options)
    self.q_norm = qk_norm(cfg.heads, arch, options["param_dtype"])
    self.k_norm = qk_norm(arch.kv_heads, arch, options["param_dtype"])

  def _make_projections(self, cfg: ModelConfig, arch: ArchConfig, **options: Any) -> None:
    queries, keys = cfg.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    self.q_proj = nnx.Linear(cfg.width, queries, use_bias=arch.qkv_bias, **options)
    self.k_proj = nnx.Linear(cfg.width, keys, use_bias=arch.qkv_bias, **options)
    self.v_proj = nnx.Linear(cfg.width, keys, use_bias=arch.qkv_bias, **options)
    self.o_proj = nnx.Linear(queries, cfg.width, use_bias=arch.out_bias, **options)

  def project(self, x_BTD: Array) -> tuple[Array, Array, Array]:
    """Queries (B, T, H·h), keys and values (B, T, K·h)."""
    return self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)

  def __call__(
    self, x_BTD: Array, view: PositionView, cache: Cache | None, slot: Array | int
  ) -> tuple[Array, Cache | None]:
    q, k, v = self.project(x_BTD)
    if not self.norm_per_head:
      q, k = self._normed(q, k)
    q, k, v = (split_heads(y, -1, self.head_dim) for y in (q, k, v))
    if self.norm_per_head:
      q, k = self._normed(q, k)
    q, k = rotate(q, view), rotate(k, view)
    if cache is not None:
      cache = fill_cache(cache, k, v, slot)
      k, v = cache["key"], cache["value"]
    y_BTHh = attend(q, k, v, view.mask_BTS, scale=self.scale, cap=self.softcap)
    return self.o_proj(split_heads(y_BTHh, -1)), cache

  def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
    if self.q_norm is None or self.k_norm is None:
      return q, k
    return self.q_norm(q), self.k_norm(k)


def qk_norm(heads: int, arch: ArchConfig, param_dtype: Any) -> RMSNorm | None:
  """The norm of queries or keys with `heads` heads, per head or over all heads; None without `qk_norm`."""
  if not arch.qk_norm:
    return None
  return RMSNorm(arch.head_dim * (1 if arch.qk_norm_per_head else heads), arch, param_dtype=param_dtype)


class LlamaMLP(nnx.Module):
  """down(act(gate(x))·up(x)) (SwiGLU, arXiv 2002.05202)."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **options: Any):
    self.activation = arch.activation
    self._make_projections(cfg, arch, **options)

  def _make_projections(self, cfg: ModelConfig, arch: ArchConfig, **options: Any) -> None:
    self.gate_proj = nnx.Linear(cfg.width, cfg.ff, use_bias=arch.mlp_bias, **options)
    self.up_proj = nnx.Linear(cfg.width, cfg.ff, use_bias=arch.mlp_bias, **options)
    self.down_proj = nnx.Linear(cfg.ff, cfg.width, use_bias=arch.mlp_bias, **options)

  def project(self, x_BTD: Array) -> tuple[Array, Array]:
    """Gates and features, both (B, T, F)."""
    return self.gate_proj(x_BTD), self.up_proj(x_BTD)

  def __call__(self, x_BTD: Array) -> Array:
    gate, features = self.project(x_BTD)
    return self.down_proj(ACTIVATIONS[self.activation](gate) * features)


class LlamaLayer(nnx.Module):
  """x += attention(norm(x)); x += mlp(norm(x)).

  `post_norms` adds a norm after attention and after the MLP; `pre_norms=False` removes the norms before them.
  """

  attention_type: type[LlamaAttention] = LlamaAttention
  mlp_type: type[Any] = LlamaMLP  # an nnx module, constructed as LlamaMLP

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **options: Any):
    def norm() -> RMSNorm:
      return RMSNorm(cfg.width, arch, param_dtype=options["param_dtype"])

    self.pre_norms, self.post_norms = arch.pre_norms, arch.post_norms
    if arch.pre_norms:
      self.input_layernorm = norm()
    self.post_attention_layernorm = norm()
    if arch.pre_norms and arch.post_norms:
      self.pre_feedforward_layernorm = norm()
    if arch.post_norms:
      self.post_feedforward_layernorm = norm()
    self.self_attn = self.attention_type(cfg, arch, **options)
    self.mlp = self.mlp_type(cfg, arch, **options)

  def __call__(
    self, x_BTD: Array, view: PositionView, cache: Cache | None, slot: Array | int
  ) -> tuple[Array, Cache | None]:
    y, cache = self.self_attn(self.input_layernorm(x_BTD) if self.pre_norms else x_BTD, view, cache, slot)
    if not self.post_norms:
      x_BTD = x_BTD + y
      return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
    x_BTD = x_BTD + self.post_attention_layernorm(y)
    y = self.mlp(self.pre_feedforward_layernorm(x_BTD) if self.pre_norms else x_BTD)
    return x_BTD + self.post_feedforward_layernorm(y), cache


class Llama(LanguageModel):
  """Maps token ids to features (`hidden`); the head is `lm_head` or, if tied, the token embedding."""

  layer_type: type[LlamaLayer] = LlamaLayer

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    arch = cfg.arch or ArchConfig()
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    init = nnx.initializers.normal(0.02)
    options = dtypes | {"kernel_init": init, "rngs": rngs}
    self.arch, self.remat, self.softcap = StaticArch(arch), cfg.remat, arch.logit_softcap
    self.embed_tokens = nnx.Embed(vocab_size, cfg.width, **dtypes, embedding_init=init, rngs=rngs)
    self.layers = nnx.List([self._make_layer(i, cfg, arch, **options) for i in range(cfg.layers)])
    self.norm = RMSNorm(cfg.width, arch, param_dtype=dtypes["param_dtype"])
    self.lm_head = None if arch.tied else nnx.Linear(cfg.width, vocab_size, use_bias=False, **options)

  def _make_layer(self, index: int, cfg: ModelConfig, arch: ArchConfig, **options: Any) -> LlamaLayer:
    return self.layer_type(cfg, arch, **options)

  @property
  def head(self) -> nnx.Linear | nnx.Embed:
    """The vocabulary projection."""
    return self.embed_tokens if self.lm_head is None else self.lm_head

  def hidden(
    self, tokens_BT: Array, positions_BT: Array, mask_BTS: Array, cache: Any = None, slot: Any = 0
  ) -> tuple[Array, list[Cache | None]]:
    """Features (B, T, D) before the head, and the cache of each layer (None without one)."""
    arch = self.arch.values
    x_BTD = self.embed_tokens(tokens_BT)
    if arch.embed_scale:
      x_BTD = x_BTD * jnp.asarray(math.sqrt(x_BTD.shape[-1]), x_BTD.dtype)
    full, windowed = position_views(arch, positions_BT, mask_BTS, slot, cached=cache is not None)
    full_layers = range(len(self.layers)) if arch.window is None else arch.full_layers or ()
    views = [full if i in full_layers else windowed for i in range(len(self.layers))]
    x_BTD, caches = run_blocks(self.layers, x_BTD, views, cache, slot, self.remat)
    return self.norm(x_BTD), caches

  def empty_cache(self, batch: int, slots: int) -> list[Cache]:
    """A cache of zeros for `slots` positions in each layer."""
    arch = self.arch.values
    return empty_cache(len(self.layers), batch, slots, arch.kv_heads, arch.head_dim, self.embed_tokens.dtype)


class StaticArch:
  """A hashable `ArchConfig`, as static attributes of modules must be; equal settings give equal graphs."""

  def __init__(self, values: ArchConfig):
    self.values = values

  def __eq__(self, other: object) -> bool:
    return isinstance(other, StaticArch) and self.values == other.values

  def __hash__(self) -> int:
    return hash(repr(self.values))

"""The Llama family: Llama 2 and 3, Mistral, SmolLM2, Qwen3, Gemma 1 and 3. One block; `ArchConfig` tells them apart.

Paths are those of Hugging Face's code without `model.`: `layers.0.self_attn.q_proj`, `embed_tokens`, `norm`, `lm_head`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.family import Family, LanguageModel, Names
from lora_exp.models.layers import ACTIVATIONS, Cache, attend, empty_cache, fill_cache, run_blocks

Array = jax.Array


class AttentionMasks(NamedTuple):
  """What a kind of layer (global, or with a window) knows of the positions."""

  cos_BT1h: Array
  sin_BT1h: Array
  mask_BTS: Array


class RMSNorm(nnx.Module):
  """x/rms(x) in float32, times `scale`, or 1 + scale where `offset` (then zeros are the identity)."""

  def __init__(self, features: int, arch: ArchConfig, *, param_dtype):
    self.eps, self.offset = arch.norm_eps, arch.norm_offset
    self.scale = nnx.Param((jnp.zeros if arch.norm_offset else jnp.ones)(features, param_dtype))

  def __call__(self, x: Array) -> Array:
    wide, scale = x.astype(jnp.float32), self.scale[...]
    wide = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.eps)
    if self.offset:
      return (wide * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return wide.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nnx.Module):
  """Rotary attention in which H/K query heads share a key/value head."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **made: Any):
    linear = lambda fan_in, out, bias: nnx.Linear(fan_in, out, use_bias=bias, **made)
    self.head_dim, self.softcap = arch.head_dim, arch.attn_softcap
    self.scale = (arch.query_scale or arch.head_dim) ** -0.5
    self.q_proj = linear(cfg.width, cfg.heads * arch.head_dim, arch.qkv_bias)
    self.k_proj = linear(cfg.width, arch.kv_heads * arch.head_dim, arch.qkv_bias)
    self.v_proj = linear(cfg.width, arch.kv_heads * arch.head_dim, arch.qkv_bias)
    self.o_proj = linear(cfg.heads * arch.head_dim, cfg.width, arch.out_bias)
    norm = lambda: RMSNorm(arch.head_dim, arch, param_dtype=made["param_dtype"]) if arch.qk_norm else None
    self.q_norm, self.k_norm = norm(), norm()

  def __call__(self, x_BTD: Array, seen: AttentionMasks, cache: Cache | None, slot) -> tuple[Array, Cache | None]:
    split = lambda y: y.reshape(*y.shape[:2], -1, self.head_dim)
    q, k, v = split(self.q_proj(x_BTD)), split(self.k_proj(x_BTD)), split(self.v_proj(x_BTD))
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, seen), rotate(k, seen)
    if cache is not None:
      cache = fill_cache(cache, k, v, slot)
      k, v = cache["key"], cache["value"]
    y = attend(q, k, v, seen.mask_BTS, scale=self.scale, softcap=self.softcap)
    return self.o_proj(y.reshape(*y.shape[:2], -1)), cache


class MLP(nnx.Module):
  """down(act(gate(x))·up(x))."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **made: Any):
    linear = lambda fan_in, out: nnx.Linear(fan_in, out, use_bias=arch.mlp_bias, **made)
    self.activation = arch.activation
    self.gate_proj, self.up_proj = linear(cfg.width, cfg.ff), linear(cfg.width, cfg.ff)
    self.down_proj = linear(cfg.ff, cfg.width)

  def __call__(self, x: Array) -> Array:
    return self.down_proj(ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
  """x += attention(norm(x)); x += mlp(norm(x)). With post norms, each is normed once more before it is added."""

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **made: Any):
    norm = lambda: RMSNorm(cfg.width, arch, param_dtype=made["param_dtype"])
    self.post_norms = arch.post_norms
    self.input_layernorm, self.post_attention_layernorm = norm(), norm()
    if arch.post_norms:
      self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
    self.self_attn, self.mlp = Attention(cfg, arch, **made), MLP(cfg, arch, **made)

  def __call__(self, x_BTD: Array, seen: AttentionMasks, cache: Cache | None, slot) -> tuple[Array, Cache | None]:
    y, cache = self.self_attn(self.input_layernorm(x_BTD), seen, cache, slot)
    if not self.post_norms:
      x_BTD = x_BTD + y
      return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), cache
    x_BTD = x_BTD + self.post_attention_layernorm(y)
    return x_BTD + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x_BTD))), cache


class Llama(LanguageModel):
  """Tokens to features (`hidden`); the head is `lm_head` or, where tied, the token embedding."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    arch = cfg.arch or ArchConfig()
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    made = dtypes | {"kernel_init": nnx.initializers.normal(0.02), "rngs": rngs}
    self.arch, self.remat, self.softcap = _Arch(arch), cfg.remat, arch.logit_softcap
    self.embed_tokens = nnx.Embed(
      vocab_size, cfg.width, **dtypes, embedding_init=nnx.initializers.normal(0.02), rngs=rngs
    )
    self.layers = nnx.List([Layer(cfg, arch, **made) for _ in range(cfg.layers)])
    self.norm = RMSNorm(cfg.width, arch, param_dtype=dtypes["param_dtype"])
    self.lm_head = None if arch.tied else nnx.Linear(cfg.width, vocab_size, use_bias=False, **made)

  @property
  def head(self) -> nnx.Linear | nnx.Embed:
    """The vocabulary projection."""
    return self.embed_tokens if self.lm_head is None else self.lm_head

  def hidden(
    self, tokens_BT: Array, positions_BT: Array, mask_BTS: Array, cache: Any = None, slot: Any = 0
  ) -> tuple[Array, list]:
    """Features (B, T, D) before the head, and the cache of each layer (None without one)."""
    arch = self.arch.values
    x_BTD = self.embed_tokens(tokens_BT)
    if arch.embed_scale:
      x_BTD = x_BTD * jnp.asarray(math.sqrt(x_BTD.shape[-1]), x_BTD.dtype)
    wide, narrow = seen(arch, positions_BT, mask_BTS, slot)
    full = range(len(self.layers)) if arch.window is None else arch.full_layers or ()
    sees = [wide if i in full else narrow for i in range(len(self.layers))]
    x_BTD, caches = run_blocks(self.layers, x_BTD, sees, cache, slot, self.remat)
    return self.norm(x_BTD), caches

  def empty_cache(self, batch: int, slots: int) -> list[Cache]:
    """A cache of zeros for `slots` positions in each layer."""
    arch = self.arch.values
    return empty_cache(
      len(self.layers), batch, slots, arch.kv_heads, arch.head_dim, self.embed_tokens.dtype
    )


class _Arch:
  """An `ArchConfig` as a static attribute of a module, which must hash: equal settings make equal graphs."""

  def __init__(self, values: ArchConfig):
    self.values = values

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Arch) and self.values == other.values

  def __hash__(self) -> int:
    return hash(repr(self.values))


def seen(arch: ArchConfig, positions_BT: Array, mask_BTS: Array, slot) -> tuple[AttentionMasks, AttentionMasks]:
  """What layers without and with the window know of the positions."""
  wide = AttentionMasks(*angles(positions_BT, arch.head_dim, arch.rope_theta, arch.rope_scaling), mask_BTS)
  if arch.window is None:
    return wide, wide
  T, S = mask_BTS.shape[1:]
  behind = slot + jnp.arange(T)[:, None] - jnp.arange(S)
  near = wide if arch.rope_local_theta is None else angles(positions_BT, arch.head_dim, arch.rope_local_theta, None)
  return wide, AttentionMasks(near[0], near[1], mask_BTS & (behind < arch.window))


def angles(positions_BT: Array, head_dim: int, theta: float, scaling: dict | None) -> tuple[Array, Array]:
  """Cosine and sine (B, T, 1, h) of each position's rotation, in float32.

  The frequencies are theta^(-2i/h) (RoFormer, arXiv 2104.09864), for longer contexts divided by `factor` (linear) or,
  where they turn less than `low_freq_factor` times within the original context, so and smoothly in between (llama3).
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  kind = "default" if scaling is None else scaling.get("rope_type", scaling.get("type", "default"))
  if scaling is not None and kind == "linear":
    frequency = frequency / scaling["factor"]
  if scaling is not None and kind == "llama3":
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    frequency = kept * frequency + (1 - kept) * frequency / scaling["factor"]
  angle = positions_BT[..., None, None] * jnp.concatenate([frequency, frequency])
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHh: Array, seen: AttentionMasks) -> Array:
  """Each pair (i, i + h/2) of features turned by its position's angle."""
  first, second = jnp.split(x_BTHh.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate([-second, first], axis=-1)
  return (x_BTHh * seen.cos_BT1h + turned * seen.sin_BT1h).astype(x_BTHh.dtype)


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FAMILY = Family(
  build=Llama,
  presets={
    "attention": ATTENTION,
    "qv": ("self_attn.q_proj", "self_attn.v_proj"),
    "mlp": FEED_FORWARD,
    "all_linear": (*ATTENTION, *FEED_FORWARD),
    "embeddings": ("embed_tokens",),
    "head": ("lm_head",),
  },
  axes={
    "embed_tokens.embedding": ("vocab", "embed"),
    "q_proj.kernel": ("embed", "heads"),
    "k_proj.kernel": ("embed", "kv_heads"),
    "v_proj.kernel": ("embed", "kv_heads"),
    "o_proj.kernel": ("heads", "embed"),
    "q_proj.bias": ("heads",),
    "k_proj.bias": ("kv_heads",),
    "v_proj.bias": ("kv_heads",),
    "gate_proj.kernel": ("embed", "mlp"),
    "up_proj.kernel": ("embed", "mlp"),
    "down_proj.kernel": ("mlp", "embed"),
    "gate_proj.bias": ("mlp",),
    "up_proj.bias": ("mlp",),
    "lm_head.kernel": ("embed", "vocab"),
  },
  units=lambda cfg: {"heads": cfg.heads, "kv_heads": (cfg.arch or ArchConfig()).kv_heads},
  names=Names(ignore=(r".*rotary_emb\.inv_freq", r"lm_head\.weight")),
)

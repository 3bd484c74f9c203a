"""The decoder of Mixtral and Qwen3-MoE: Llama's, with a router and experts instead of the feed-forward.

The kernels of all experts of a layer are one array each, (E, I, O), as in transformers 5: `mlp.experts.gate_up_proj`
and `mlp.experts.down_proj`. An adapter has an A and a B for each expert. All experts are computed for all tokens, and
the router's weights, most of which are 0, are applied to their outputs. This takes E/k times as many FLOPs as sorting
the tokens by expert, but is a single batched product.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ArchConfig, ModelConfig
from lora_exp.models.modules.attention import ACTIVATIONS
from lora_exp.models.modules.llama_decoder import Llama, LlamaLayer

Array = jax.Array


class Experts(nnx.Module):
  """E feed-forwards down(act(gate(x))·up(x)); the outputs of `gate_up_proj` are gate and up, concatenated."""

  def __init__(self, cfg: ModelConfig, count: int, activation: str, **options: Any):
    self.count, self.activation = count, activation
    self.gate_up_proj = nnx.Einsum("end,edf->enf", (count, cfg.width, 2 * cfg.ff), **options)
    self.down_proj = nnx.Einsum("enf,efd->end", (count, cfg.ff, cfg.width), **options)

  def __call__(self, x_ND: Array) -> Array:
    """The output of each expert for each token, (E, N, D)."""
    gate, features = jnp.split(self.gate_up_proj(jnp.broadcast_to(x_ND, (self.count, *x_ND.shape))), 2, axis=-1)
    return self.down_proj(ACTIVATIONS[self.activation](gate) * features)


class SparseMLP(nnx.Module):
  """The sum of the outputs of the k experts with the largest router probabilities, weighted by these.

  With `norm_topk_prob` their weights sum to 1.
  """

  def __init__(self, cfg: ModelConfig, arch: ArchConfig, **options: Any):
    settings = arch.options or {}
    count = int(settings["num_experts"])
    self.chosen, self.normalised = int(settings["num_experts_per_tok"]), bool(settings["norm_topk_prob"])
    self.gate = nnx.Linear(cfg.width, count, use_bias=False, **options)
    self.experts = Experts(cfg, count, arch.activation, **options)

  def __call__(self, x_BTD: Array) -> Array:
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    p_NE = jax.nn.softmax(self.gate(x_ND).astype(jnp.float32), axis=-1)
    top_Nk, index_Nk = jax.lax.top_k(p_NE, self.chosen)
    if self.normalised:
      top_Nk = top_Nk / top_Nk.sum(-1, keepdims=True)
    weights_NE = (jax.nn.one_hot(index_Nk, p_NE.shape[-1], dtype=top_Nk.dtype) * top_Nk[..., None]).sum(1)
    y_ND = jnp.einsum("end,ne->nd", self.experts(x_ND), weights_NE.astype(x_ND.dtype))
    return y_ND.reshape(x_BTD.shape)


class MoELayer(LlamaLayer):
  """Llama's layer with experts."""

  mlp_type = SparseMLP


class MoE(Llama):
  """Llama with experts in all layers but `dense_layers`, whose feed-forward has `dense_ff` features."""

  layer_type = MoELayer

  def _make_layer(self, index: int, cfg: ModelConfig, arch: ArchConfig, **options: Any) -> LlamaLayer:
    settings = arch.options or {}
    if index in settings.get("dense_layers", ()):
      return LlamaLayer(replace(cfg, ff=settings["dense_ff"]), arch, **options)
    return super()._make_layer(index, cfg, arch, **options)

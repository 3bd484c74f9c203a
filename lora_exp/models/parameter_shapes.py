"""The shapes of all parameters of a model by dotted path, from its settings alone. No jax.

The modules in `models/modules` make the arrays. A test compares both for every family.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from lora_exp.config.schema import ArchConfig, ModelConfig

Shapes = dict[str, tuple[int, ...]]


def linear(path: str, fan_in: int, fan_out: int, bias: bool = False) -> Shapes:
  """The kernel (I, O) and the bias (O,) of a linear layer."""
  shapes: Shapes = {f"{path}.kernel": (fan_in, fan_out)}
  return shapes | {f"{path}.bias": (fan_out,)} if bias else shapes


def layer_norm(path: str, width: int) -> Shapes:
  """The scale and the bias of a layer norm."""
  return {f"{path}.scale": (width,), f"{path}.bias": (width,)}


def _llama_norms(prefix: str, model: ModelConfig, arch: ArchConfig) -> Shapes:
  """The norms of a layer."""
  names = ["input_layernorm"] if arch.pre_norms else []
  names.append("post_attention_layernorm")
  if arch.pre_norms and arch.post_norms:
    names.append("pre_feedforward_layernorm")
  if arch.post_norms:
    names.append("post_feedforward_layernorm")
  shapes: Shapes = {f"{prefix}.{name}.scale": (model.width,) for name in names}
  if arch.qk_norm:
    for name, heads in (("q_norm", model.heads), ("k_norm", arch.kv_heads)):
      features = arch.head_dim * (1 if arch.qk_norm_per_head else heads)
      shapes[f"{prefix}.self_attn.{name}.scale"] = (features,)
  return shapes


def _llama_attention(prefix: str, model: ModelConfig, arch: ArchConfig) -> Shapes:
  queries, keys = model.heads * arch.head_dim, arch.kv_heads * arch.head_dim
  return {
    **linear(f"{prefix}.self_attn.q_proj", model.width, queries, arch.qkv_bias),
    **linear(f"{prefix}.self_attn.k_proj", model.width, keys, arch.qkv_bias),
    **linear(f"{prefix}.self_attn.v_proj", model.width, keys, arch.qkv_bias),
    **linear(f"{prefix}.self_attn.o_proj", queries, model.width, arch.out_bias),
  }


def _llama_mlp(prefix: str, model: ModelConfig, arch: ArchConfig) -> Shapes:
  return {
    **linear(f"{prefix}.mlp.gate_proj", model.width, model.ff, arch.mlp_bias),
    **linear(f"{prefix}.mlp.up_proj", model.width, model.ff, arch.mlp_bias),
    **linear(f"{prefix}.mlp.down_proj", model.ff, model.width, arch.mlp_bias),
  }


def _phi3_layer(prefix: str, model: ModelConfig, arch: ArchConfig) -> Shapes:
  queries, keys = model.heads * arch.head_dim, arch.kv_heads * arch.head_dim
  return {
    **linear(f"{prefix}.self_attn.qkv_proj", model.width, queries + 2 * keys, arch.qkv_bias),
    **linear(f"{prefix}.self_attn.o_proj", queries, model.width, arch.out_bias),
    **linear(f"{prefix}.mlp.gate_up_proj", model.width, 2 * model.ff, arch.mlp_bias),
    **linear(f"{prefix}.mlp.down_proj", model.ff, model.width, arch.mlp_bias),
  }


def _sparse_mlp(prefix: str, model: ModelConfig, arch: ArchConfig) -> Shapes:
  """The router, and the kernels (E, I, O) of all experts."""
  experts = int((arch.options or {})["num_experts"])
  return {
    **linear(f"{prefix}.mlp.gate", model.width, experts),
    f"{prefix}.mlp.experts.gate_up_proj.kernel": (experts, model.width, 2 * model.ff),
    f"{prefix}.mlp.experts.down_proj.kernel": (experts, model.ff, model.width),
  }


def _around_layers(layers: Mapping[str, tuple[int, ...]], model: ModelConfig, vocab_size: int) -> Shapes:
  """Llama's embedding, `layers`, last norm and head."""
  head = {} if (model.arch or ArchConfig()).tied else linear("lm_head", model.width, vocab_size)
  return {"embed_tokens.embedding": (vocab_size, model.width), **layers, "norm.scale": (model.width,), **head}


def llama_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
  """The parameters of Llama, Mistral, Qwen, Gemma and OLMo-2."""
  arch, layers = model.arch or ArchConfig(), Shapes()
  for i in range(model.layers):
    prefix = f"layers.{i}"
    layers |= _llama_norms(prefix, model, arch) | _llama_attention(prefix, model, arch)
    layers |= _llama_mlp(prefix, model, arch)
  return _around_layers(layers, model, vocab_size)


def phi3_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
  """The parameters of Phi-3, with fused kernels."""
  arch, layers = model.arch or ArchConfig(), Shapes()
  for i in range(model.layers):
    layers |= _llama_norms(f"layers.{i}", model, arch) | _phi3_layer(f"layers.{i}", model, arch)
  return _around_layers(layers, model, vocab_size)


def moe_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
  """The parameters of Mixtral and Qwen3-MoE."""
  arch, layers = model.arch or ArchConfig(), Shapes()
  options = arch.options or {}
  for i in range(model.layers):
    prefix = f"layers.{i}"
    layers |= _llama_norms(prefix, model, arch) | _llama_attention(prefix, model, arch)
    if i in options.get("dense_layers", ()):
      layers |= _llama_mlp(prefix, replace(model, ff=int(options["dense_ff"])), arch)
    else:
      layers |= _sparse_mlp(prefix, model, arch)
  return _around_layers(layers, model, vocab_size)


def minigpt_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
  """The parameters of MiniGPT."""
  width = model.width
  shapes: Shapes = {"token_emb.embedding": (vocab_size, width), "pos_emb.embedding": (model.max_len, width)}
  for i in range(model.layers):
    for name in ("query", "key", "value", "out"):
      shapes |= linear(f"blocks.{i}.mha.{name}", width, width, bias=True)
    shapes |= layer_norm(f"blocks.{i}.layer_norm1", width) | layer_norm(f"blocks.{i}.layer_norm2", width)
    shapes |= linear(f"blocks.{i}.linear1", width, model.ff, bias=True)
    shapes |= linear(f"blocks.{i}.linear2", model.ff, width, bias=True)
  return shapes | linear("output_layer", width, vocab_size, bias=True)


def gpt2_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
  """The parameters of GPT-2."""
  width = model.width
  shapes: Shapes = {"wte.embedding": (vocab_size, width), "wpe.embedding": (model.max_len, width)}
  for i in range(model.layers):
    shapes |= layer_norm(f"h.{i}.ln_1", width) | layer_norm(f"h.{i}.ln_2", width)
    shapes |= linear(f"h.{i}.attn.c_attn", width, 3 * width, bias=True)
    shapes |= linear(f"h.{i}.attn.c_proj", width, width, bias=True)
    shapes |= linear(f"h.{i}.mlp.c_fc", width, model.ff, bias=True)
    shapes |= linear(f"h.{i}.mlp.c_proj", model.ff, width, bias=True)
  head = {} if (model.arch or ArchConfig()).tied else linear("lm_head", width, vocab_size)
  return shapes | layer_norm("ln_f", width) | head


def mlp_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
  """The parameters of a multi-layer perceptron, which has no vocabulary."""
  assert model.mlp is not None
  shapes, sizes = Shapes(), [model.mlp.inputs, *model.mlp.hidden, model.mlp.outputs]
  for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
    shapes |= linear("output" if i == len(sizes) - 2 else f"layers.{i}", fan_in, fan_out, bias=True)
  return shapes

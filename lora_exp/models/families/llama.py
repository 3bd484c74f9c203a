"""Llama 2 and 3, SmolLM2. Module paths are those of transformers without `model.`: `layers.0.self_attn.q_proj`."""

from lora_exp.models.arch_checks import check_rotary
from lora_exp.models.config_rules import HEAD_GROUPS, all_heads, width_by_heads
from lora_exp.models.config_table import REQUIRED, Activation, Count, Flag, Number, PublishedConfig
from lora_exp.models.family import Family, grouped_head_units
from lora_exp.models.parameter_shapes import llama_shapes
from lora_exp.models.rotation_rules import ROTATION
from lora_exp.models.tensor_names import TensorNames

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
SIZE_FIELDS = (
  Count("layers", "num_hidden_layers"),
  Count("width", "hidden_size"),
  Count("heads", "num_attention_heads"),
  Count("ff", "intermediate_size"),
  Count("max_len", "max_position_embeddings"),
  Count("vocab_size", "vocab_size"),
  Count("arch.kv_heads", "num_key_value_heads", all_heads),
  Count("arch.head_dim", "head_dim", width_by_heads),
  Number("arch.norm_eps", "rms_norm_eps", null=1e-6),
  Flag("arch.tied", "tie_word_embeddings"),
)
ACTIVATION_FIELDS = (Activation("arch.activation", "hidden_act"),)
ATTENTION_BIAS_FIELDS = (Flag("arch.qkv_bias", "attention_bias"), Flag("arch.out_bias", "attention_bias"))
BIAS_FIELDS = (*ATTENTION_BIAS_FIELDS, Flag("arch.mlp_bias", "mlp_bias"))
REQUIRED_SIZES = dict.fromkeys(
  ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"), REQUIRED
)
NAMES = TensorNames(
  computed=(
    (r".*rotary_emb\.inv_freq", "rotary frequencies"),
    (r"rope_(freqs|factors_short|factors_long)\.weight", "rotary factors"),  # of GGUF files
  )
)
FAMILY = Family(
  name="llama",
  module="lora_exp.models.modules.llama_decoder:Llama",
  shapes=llama_shapes,
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
  units=grouped_head_units,
  names=NAMES,
  config=PublishedConfig(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=(*SIZE_FIELDS, *ACTIVATION_FIELDS, *BIAS_FIELDS),
    defaults={**REQUIRED_SIZES, "hidden_act": "silu", "max_position_embeddings": 2048},
    rules=(HEAD_GROUPS, ROTATION),
  ),
  check=check_rotary,
)

"""GPT-2, small to XL (Radford et al., 2019). Module paths are those of transformers without `transformer.`."""

from typing import Any

from lora_exp.config.schema import ModelConfig
from lora_exp.models.arch_checks import check_learned_positions
from lora_exp.models.config_rules import no_fields, width_by_heads
from lora_exp.models.config_table import (
  REQUIRED,
  Activation,
  ConfigFile,
  ConfigRule,
  Count,
  Flag,
  Number,
  PublishedConfig,
  Settings,
)
from lora_exp.models.family import Family, head_units
from lora_exp.models.parameter_shapes import gpt2_shapes
from lora_exp.models.tensor_names import TensorNames


def four_widths(settings: Settings) -> int:
  """The feed-forward width if `n_inner` is null."""
  width: int = settings["width"]
  return 4 * width


def _read_heads(file: ConfigFile, settings: Settings) -> None:
  settings |= {"arch.kv_heads": settings["heads"], "arch.head_dim": width_by_heads(settings)}


def _read_nothing(file: ConfigFile, settings: Settings) -> None:
  """Reads no fields: the dropout of fine-tuning is set by our config, not by the file."""


def _write_dropout(model: ModelConfig) -> dict[str, Any]:
  return {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout, "attn_pdrop": 0.0}


ATTENTION = ("attn.c_attn", "attn.c_proj")
FEED_FORWARD = ("mlp.c_fc", "mlp.c_proj")
FAMILY = Family(
  name="gpt2",
  module="lora_exp.models.modules.gpt2_decoder:GPT2",
  shapes=gpt2_shapes,
  presets={
    "attention": ATTENTION,
    "qv": ("attn.c_attn",),  # one kernel for queries, keys and values: the keys are adapted too
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
  units=head_units,
  names=TensorNames(
    prefix="transformer.",
    transposed=False,
    token_embedding="wte",
    computed=((r".*\.attn\.bias", "causal mask"), (r".*\.attn\.masked_bias", "masking score")),
  ),
  config=PublishedConfig(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fields=(
      Count("layers", "n_layer"),
      Count("width", "n_embd"),
      Count("heads", "n_head"),
      Count("ff", "n_inner", four_widths),
      Count("max_len", "n_positions"),
      Count("vocab_size", "vocab_size"),
      Number("arch.norm_eps", "layer_norm_epsilon", null=1e-5),
      Activation("arch.activation", "activation_function", gelu_tanh="gelu_new"),
      Flag("arch.tied", "tie_word_embeddings"),
    ),
    defaults={
      **dict.fromkeys(("n_layer", "n_embd", "n_head", "vocab_size"), REQUIRED),
      "n_positions": 1024,
      "layer_norm_epsilon": 1e-5,
      "activation_function": "gelu_new",
      "scale_attn_weights": True,
      "tie_word_embeddings": True,
    },
    fixed={"arch.qkv_bias": True, "arch.out_bias": True, "arch.mlp_bias": True},
    rules=(ConfigRule(_read_heads, no_fields), ConfigRule(_read_nothing, _write_dropout)),
    supported={"scale_attn_weights": True},
  ),
  check=check_learned_positions,
)

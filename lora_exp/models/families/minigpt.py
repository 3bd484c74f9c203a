"""MiniGPT of the JAX AI stack's tutorial. There are no published weights, so it is pretrained on first use."""

from lora_exp.models.arch_checks import check_heads
from lora_exp.models.family import Family, head_units
from lora_exp.models.parameter_shapes import minigpt_shapes

FAMILY = Family(
  name="minigpt",
  module="lora_exp.models.modules.minigpt_decoder:MiniGPT",
  shapes=minigpt_shapes,
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
  units=head_units,
  check=check_heads,
)

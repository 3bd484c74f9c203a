"""A multi-layer perceptron for numbers: `layers.0`, `layers.1`, … and the `output` layer. Its sizes are `model.mlp`."""

from lora_exp.models.family import Family

FAMILY = Family(
  name="mlp",
  module="lora_exp.models.modules.multilayer_perceptron:MultilayerPerceptron",
  presets={"mlp": ("layers.*",), "all_linear": ("layers.*",), "head": ("output",)},
  axes={"kernel": ("embed", "mlp"), "bias": ("mlp",)},
)

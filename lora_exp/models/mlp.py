"""A multi-layer perceptron: numbers in, classes or numbers out. `layers.0`, `layers.1`, … and the `output` layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.family import Family
from lora_exp.models.layers import ACTIVATIONS
from lora_exp.runtime.dropout import Dropout

KERNELS = {"lecun_normal": nnx.initializers.lecun_normal, "xavier_uniform": nnx.initializers.xavier_uniform}


class MLP(nnx.Module):
  """x = dropout(activation(layer(x))) for each hidden layer, then the output layer; every layer has a bias."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    assert cfg.mlp is not None, "checked: model.family=mlp has sizes"
    sizes = [cfg.mlp.inputs, *cfg.mlp.hidden, cfg.mlp.outputs]
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    init = KERNELS[cfg.mlp.init]()
    new = lambda i: nnx.Linear(sizes[i], sizes[i + 1], **dtypes, kernel_init=init, rngs=rngs)
    self.activation = cfg.mlp.activation
    self.layers = nnx.List([new(i) for i in range(len(cfg.mlp.hidden))])
    self.dropouts = nnx.List([Dropout(cfg.dropout) for _ in cfg.mlp.hidden])
    self.output = new(len(cfg.mlp.hidden))

  def __call__(self, x_BI: jax.Array) -> jax.Array:
    """Logits of the classes, or the numbers predicted: (B, O) of x (B, I)."""
    for layer, drop in zip(self.layers, self.dropouts, strict=True):
      x_BI = drop(ACTIVATIONS[self.activation](layer(x_BI)))
    return self.output(x_BI)


FAMILY = Family(
  build=MLP,
  presets={"mlp": ("layers.*",), "all_linear": ("layers.*",), "head": ("output",)},
  axes={"kernel": ("embed", "mlp"), "bias": ("mlp",)},
  units=lambda cfg: {},
)

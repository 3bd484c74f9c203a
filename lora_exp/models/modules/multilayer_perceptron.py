"""A multi-layer perceptron: features in, class logits or predicted values out."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.config import ModelConfig
from lora_exp.models.modules.attention import ACTIVATIONS
from lora_exp.runtime.dropout import Dropout

KERNEL_INITS = {"lecun_normal": nnx.initializers.lecun_normal, "xavier_uniform": nnx.initializers.xavier_uniform}


class MultilayerPerceptron(nnx.Module):
  """x = dropout(activation(layer(x))) for each hidden layer, then the output layer; every layer has a bias."""

  def __init__(self, cfg: ModelConfig, vocab_size: int, *, rngs: nnx.Rngs):
    assert cfg.mlp is not None, "config.check requires the sizes of model.family=mlp"
    sizes = [cfg.mlp.inputs, *cfg.mlp.hidden, cfg.mlp.outputs]
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(cfg.dtype), "param_dtype": jnp.dtype(cfg.param_dtype)}
    init = KERNEL_INITS[cfg.mlp.init]()
    layers = [
      nnx.Linear(fan_in, fan_out, **dtypes, kernel_init=init, rngs=rngs) for fan_in, fan_out in pairwise(sizes)
    ]
    self.activation = cfg.mlp.activation
    self.layers = nnx.List(layers[:-1])
    self.dropouts = nnx.List([Dropout(cfg.dropout) for _ in cfg.mlp.hidden])
    self.output = layers[-1]

  def __call__(self, x_BI: jax.Array) -> jax.Array:
    """Class logits, or predicted values: x (B, I) to (B, O)."""
    for layer, drop in zip(self.layers, self.dropouts, strict=True):
      x_BI = drop(ACTIVATIONS[self.activation](layer(x_BI)))
    return self.output(x_BI)

"""Low-rank adapters for any Flax NNX model (Hu et al., arXiv 2106.09685).

Before: y = x·W. After: y = x·W + s·(x·A)·B with A (in, rank) random, B (rank, out) zero and s = alpha/rank, so that
the model's outputs are the base's, bit for bit, until B has moved. W is frozen: what trains is every `nnx.LoRAParam`.

>>> import jax, jax.numpy as jnp
>>> from flax import nnx
>>> from lora_exp import lora
>>> model = nnx.Linear(16, 4, rngs=nnx.Rngs(0))
>>> x = jnp.ones((2, 16))
>>> before = model(x)
>>> [table] = lora.inject(nnx.Sequential(model), rank=2)
>>> table.parameters, bool((model(x) == before).all())
(40, True)
>>> graph, trainable, frozen = nnx.split(model, nnx.LoRAParam, ...)
>>> sorted(nnx.to_pure_dict(trainable))
['lora_a', 'lora_b']
"""

from lora_exp.lora.files import load_adapter, save_adapter
from lora_exp.lora.inject import Adapted, draw, eject, inject, modules, place, resolve, scale_of
from lora_exp.lora.layers import Adapter, Hyper, LoRALinear
from lora_exp.lora.targets import matches, select
from lora_exp.lora.toggle import disabled, merged

__all__ = [
  "Adapted",
  "Adapter",
  "Hyper",
  "LoRALinear",
  "disabled",
  "draw",
  "eject",
  "inject",
  "load_adapter",
  "matches",
  "merged",
  "modules",
  "place",
  "resolve",
  "save_adapter",
  "scale_of",
  "select",
]

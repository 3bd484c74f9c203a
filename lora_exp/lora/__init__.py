"""Low-rank adapters for any Flax NNX model: every method worth comparing, and files that PEFT accepts.

Most methods compute y = g ⊙ (x·W + s·(x·A)·B − s·(x·A₀)·B₀) + b with some of these parts: LoRA trains A and B, DoRA
adds g, PiSSA and OLoRA take A and B from W and subtract A₀ and B₀. Others change W in another way (LoHa, IA³). Each
method is one file in `lora/methods`, whose docstring says how to add one. Three rules hold for all of them.

*The base is never rewritten.* W stays as it was loaded, quantised or not, and before the first step the model computes
the same as its base, bit for bit. `eject`, `unmerge` and `disabled` restore saved arrays; nothing is ever subtracted.

*Types say what trains.* `nnx.LoRAParam` are the trained leaves (also `Trained`, a bias or a module trained in
full), `Constant` the adapter's frozen ones. `nnx.split(model, nnx.LoRAParam, ...)` cannot select the wrong half.

*A module becomes its adapted self in place.* Its class changes to a subclass, so paths, sharing (a tied head sees the
table's adapter) and checkpoints do not. Kernels are seen as (in, out): Linear, LinearGeneral, Einsum, Conv, Embed, and
stacks of them.

    inject, eject, attach          an adapter on a model, and off it as an `Adapter`
    merge, unmerge, merged         its update in the kernels, checked by whoever merges
    disabled                       the base for a while
    Adapters                       several by name over one base
    combine_adapters, resize       arithmetic on adapters; extract: one out of two checkpoints
    save_adapter, load_adapter     PEFT's files, both ways

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

from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.adapter import Adapter
from lora_exp.lora.combine import combine_adapters
from lora_exp.lora.inject import (
  adapted_modules,
  attach,
  completed,
  draw,
  eject,
  extract_adapter,
  fans_of,
  full_paths,
  inject,
  kernels_of,
  modules,
  place,
  resolve,
  scale_of,
  train_in_full,
)
from lora_exp.lora.kernels import shape as kernel_shape
from lora_exp.lora.layers import FROZEN_PREFIX, AdapterLayer, Constant, Hyper, LoRALinear, Trained
from lora_exp.lora.merging import MergeUndo, disabled, merge, merged, unmerge
from lora_exp.lora.methods.adalora import kept_ranks
from lora_exp.lora.multi_adapter import Adapters
from lora_exp.lora.peft.adapter_files import Naming, load_adapter, save_adapter
from lora_exp.lora.quantization import quantise
from lora_exp.lora.resize import Extracted, extract, resize
from lora_exp.lora.targets import matches, select_paths

__all__ = [
  "FROZEN_PREFIX",
  "AdaptedModule",
  "Adapter",
  "AdapterLayer",
  "Adapters",
  "Constant",
  "Extracted",
  "Hyper",
  "MergeUndo",
  "LoRALinear",
  "Naming",
  "Trained",
  "adapted_modules",
  "attach",
  "combine_adapters",
  "completed",
  "disabled",
  "draw",
  "eject",
  "extract",
  "extract_adapter",
  "fans_of",
  "full_paths",
  "inject",
  "kept_ranks",
  "kernel_shape",
  "kernels_of",
  "load_adapter",
  "matches",
  "merge",
  "merged",
  "modules",
  "place",
  "quantise",
  "resize",
  "resolve",
  "save_adapter",
  "scale_of",
  "select_paths",
  "train_in_full",
  "unmerge",
]

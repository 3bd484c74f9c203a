"""Adapters for any Flax NNX model: the fine-tuning methods, arithmetic on adapters, and PEFT's file format.

Most methods compute y = g ⊙ (x·W + s·(x·A)·B − s·(x·A₀)·B₀) + b, with some of these parts. LoRA trains A and B, DoRA
adds g, PiSSA and OLoRA initialize A and B from W and subtract A₀ and B₀. Others change W in another way (LoHa, IA³).
Each method is one file in `lora/methods`, whose docstring explains how to add one. Training loops, models and data do
not belong in this package.

*The base is never modified.* W stays as it was loaded, quantised or not. Before the first step, the outputs equal those
of the base bit for bit. `eject`, `unmerge` and `disabled` restore saved arrays; they never subtract an update.

*Variable types decide what is trained.* Trained leaves are `nnx.LoRAParam`; `Trained` is a subclass for parameters of
the base that are trained in full. Frozen leaves are `Constant`. So `nnx.split(model, nnx.LoRAParam, ...)` separates
trained from frozen arrays.

*Modules are adapted in place.* The class of a module changes to a subclass; parameter paths, sharing (a tied head uses
the table's adapter) and checkpoints do not change. Linear, LinearGeneral, Einsum, Conv and Embed are supported, and
stacks of them. Kernels are viewed as (…, I, O).

    inject, attach, eject          add a new or an existing `Adapter` to a model, and remove it
    merge, unmerge, merged         put the update into the kernels
    disabled                       use the base for a while
    Adapters                       several named adapters on one base
    combine_adapters, resize       arithmetic on adapters
    extract                        a LoRA from two checkpoints
    save_adapter, load_adapter     files in PEFT's format

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

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names in EXPORTED, for type checkers
  from lora_exp.lora.adapted_module import AdaptedModule as AdaptedModule
  from lora_exp.lora.adapter import Adapter as Adapter
  from lora_exp.lora.adapter import BaseChanges as BaseChanges
  from lora_exp.lora.combine import combine_adapters as combine_adapters
  from lora_exp.lora.full_parameters import full_paths as full_paths
  from lora_exp.lora.full_parameters import train_in_full as train_in_full
  from lora_exp.lora.injection import attach as attach
  from lora_exp.lora.injection import attach_leaves as attach_leaves
  from lora_exp.lora.injection import completed as completed
  from lora_exp.lora.injection import draw as draw
  from lora_exp.lora.injection import eject as eject
  from lora_exp.lora.injection import extract_adapter as extract_adapter
  from lora_exp.lora.injection import fans_of as fans_of
  from lora_exp.lora.injection import inject as inject
  from lora_exp.lora.injection import kernels_of as kernels_of
  from lora_exp.lora.layers import FROZEN_PREFIX as FROZEN_PREFIX
  from lora_exp.lora.layers import AdapterLayer as AdapterLayer
  from lora_exp.lora.layers import Constant as Constant
  from lora_exp.lora.layers import Hyper as Hyper
  from lora_exp.lora.layers import LoRALinear as LoRALinear
  from lora_exp.lora.layers import Trained as Trained
  from lora_exp.lora.merging import MergeUndo as MergeUndo
  from lora_exp.lora.merging import disabled as disabled
  from lora_exp.lora.merging import merge as merge
  from lora_exp.lora.merging import merged as merged
  from lora_exp.lora.merging import unmerge as unmerge
  from lora_exp.lora.module_table import adapted_modules as adapted_modules
  from lora_exp.lora.module_table import modules as modules
  from lora_exp.lora.module_table import resolve as resolve
  from lora_exp.lora.multi_adapter import Adapters as Adapters
  from lora_exp.lora.peft_files.adapter_reader import load_adapter as load_adapter
  from lora_exp.lora.peft_files.adapter_writer import save_adapter as save_adapter
  from lora_exp.lora.peft_files.names import Naming as Naming
  from lora_exp.lora.peft_files.names import TiedHead as TiedHead
  from lora_exp.lora.quantization import quantise as quantise
  from lora_exp.lora.resizing import Extracted as Extracted
  from lora_exp.lora.resizing import extract as extract
  from lora_exp.lora.resizing import resize as resize
  from lora_exp.lora.target_table import scale_of as scale_of
  from lora_exp.lora.targets import matches as matches
  from lora_exp.lora.targets import select_paths as select_paths

EXPORTED = {  # module -> the names that this package exports from it
  "adapted_module": ("AdaptedModule",),
  "adapter": ("Adapter", "BaseChanges"),
  "combine": ("combine_adapters",),
  "full_parameters": ("full_paths", "train_in_full"),
  "injection": (
    "attach", "attach_leaves", "completed", "draw", "eject", "extract_adapter", "fans_of", "inject", "kernels_of",
  ),
  "layers": ("FROZEN_PREFIX", "AdapterLayer", "Constant", "Hyper", "LoRALinear", "Trained"),
  "merging": ("MergeUndo", "disabled", "merge", "merged", "unmerge"),
  "module_table": ("adapted_modules", "modules", "resolve"),
  "multi_adapter": ("Adapters",),
  "peft_files.adapter_reader": ("load_adapter",),
  "peft_files.adapter_writer": ("save_adapter",),
  "peft_files.names": ("Naming", "TiedHead"),
  "quantization": ("quantise",),
  "resizing": ("Extracted", "extract", "resize"),
  "target_table": ("scale_of",),
  "targets": ("matches", "select_paths"),
}
MODULE_OF = {name: module for module, names in EXPORTED.items() for name in names}
__all__ = list(MODULE_OF)


def __getattr__(name: str) -> Any:
  """Imports the exported names on first use (PEP 562), because most modules import jax and some do not."""
  if name not in MODULE_OF:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(import_module(f"{__name__}.{MODULE_OF[name]}"), name)

'''Fine-tuning methods, one file each. To add a method, add a file here and a YAML file in `conf/lora`.

A file defines one subclass of `Method` whose `name` is the name of the file, which is also its value of `lora.method`.
Training, packing, merging, resuming, files and reports need no further changes, and the tests run for every method in
this folder. A minimal method declares the arrays that it adds, their initialization, and their effect on a kernel
W (I, O):

    """LoRA-FA: LoRA with a random A that is frozen (arXiv 2308.03303)."""

    import math
    from typing import Any

    import jax
    import jax.numpy as jnp

    from lora_exp.lora.adapted_module import AdaptedModule
    from lora_exp.lora.methods.base import Array, Factors, InitSettings, Leaf, Leaves, Method

    class LoRAFA(Method):
      """ΔW = s·A·B; B is trained."""

      name = "lorafa"
      title = "LoRA-FA"
      paper = "2308.03303"
      cost = "R·O parameters, and R·I constants"
      leaves = {"fa_a": Leaf("IR", trained=False), "fa_b": Leaf("RO")}
      peft_name = "lora"

      def init(
        self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings
      ) -> dict[str, Array]:
        """Draws A and sets B to zero."""
        shape = self.shape("fa_a", kernel, module)
        a = jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(module.fan_in)
        return {"fa_a": a, "fa_b": jnp.zeros(self.shape("fa_b", kernel, module))}

      def factors(self, leaves: Leaves) -> Factors:
        """Returns A and B."""
        return leaves["fa_a"], leaves["fa_b"]

      def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Any]:
        """Returns the leaves of a LoRA, as which PEFT loads the file."""
        return {"lora_a": leaves["fa_a"], "lora_b": leaves["fa_b"]}

The file `conf/lora/lorafa.yaml` holds the settings that differ from `conf/lora/_base.yaml`:

    # LoRA-FA: A is random and frozen (2308.03303).
    defaults:
      - _base
      - _self_

    method: lorafa

**Leaves.** `Leaf(axes, trained, shared)` has one letter per axis: I in, O out, R rank. A leaf that is not trained is a
constant. A shared leaf is one array for all modules (VeRA). Override `sizes` to give leaves that are not shared further
letters, such as M and N where I = M·N. W may have leading axes, those of a stack of kernels. Use
`self.shape(leaf, kernel, module)` and `...` in index expressions to support stacks.

**Update.** Override one of `factors` (ΔW = s·A·B, which is never formed), `delta` (ΔW, as in LoHa) and `adapted` (the
adapted kernel, as in IA³; set `additive = False`). The scale s is 0 where a trial of a pack does not adapt the module;
the result must then be W. The functions must accept JAX and NumPy arrays. `apply` may be overridden with a cheaper
product.

**Restrictions** are class attributes, which `base.py` explains: `paddable`, `stackable`, `uses_alpha`, `one_rank`,
`drops_input`. `check` returns problems with settings. `options` declares settings of the method with their defaults;
users set them as `lora.options.NAME=VALUE`.

**Training.** `update_factors` scales the updates of some leaves (LoRA+); `wrap_optimizer` wraps the optimizer
(AdaLoRA).

**PEFT.** `peft` is a `PeftFormat`: names of tensors and fields of the config. If it is None, the method is written in
the format of `peft_name` with the arrays of `peft_leaves`. A method that PEFT cannot compute at all defines its keys in
a `PeftFormat` and returns the reason in `peft_reason`; its files are marked `"peft": false`. `peft_reads` is a format
that is only read, and converted to `peft_name`.
'''

from functools import cache
from importlib import import_module

from lora_exp.config import InputError, LoraConfig, did_you_mean
from lora_exp.lora.method_files import method_names
from lora_exp.lora.methods.base import Array, Factors, InitSettings, Leaf, Leaves, Method, Modules, per_kernel

__all__ = [
  "Array",
  "Factors",
  "InitSettings",
  "Leaf",
  "Leaves",
  "Method",
  "Modules",
  "every",
  "get",
  "names",
  "of",
  "per_kernel",
  "variant",
]


@cache
def names() -> tuple[str, ...]:
  """Returns the names of all methods, which are files of this folder."""
  return method_names(__path__)


@cache
def get(name: str) -> Method:
  """Returns the method that the file `name` defines. Raises InputError with the nearest name if there is none."""
  if name not in names():
    raise InputError(f"lora.method={name}: choose {', '.join(names())}{did_you_mean(name, names())}")
  module = import_module(f"{__name__}.{name}")
  for value in vars(module).values():
    if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
      return value()
  raise TypeError(f"{module.__file__} defines no subclass of Method with name = {name!r}")


def every() -> tuple[Method, ...]:
  """Returns all methods, sorted by name."""
  return tuple(get(name) for name in names())


def of(config: LoraConfig) -> Method:
  """Returns the method of lora.method, or of lora.init if that is a method (PiSSA, OLoRA)."""
  return variant(config.method, config.init)


def variant(method: str, init: str) -> Method:
  """Returns the method that `lora.method` and `lora.init` select. Raises InputError if they are incompatible."""
  if init not in names() or get(init).init_of is None:
    return get(method)
  initialized = get(init)
  if method not in (initialized.init_of, initialized.name):
    raise InputError(f"lora.init={init}: needs lora.method={initialized.init_of}, not {method}")
  return initialized

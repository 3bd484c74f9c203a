'''Fine-tuning methods, one file each. To add one, add a file here and a YAML file in `conf/lora`; nothing else.

A file defines one subclass of `Method` whose `name` is the file's name. The names of the folder's files are the values
of `lora.method`. Everything else follows from the class: training, packing, merging, resuming, files, reports and the
tests, which run for every method of this folder. The smallest method says which arrays it adds, how they start, and
what they do to a kernel W (I, O):

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
        """A is drawn, B is zero."""
        shape = self.shape("fa_a", kernel, module)
        a = jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(module.fan_in)
        return {"fa_a": a, "fa_b": jnp.zeros(self.shape("fa_b", kernel, module))}

      def factors(self, leaves: Leaves) -> Factors:
        """A and B."""
        return leaves["fa_a"], leaves["fa_b"]

      def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Any]:
        """PEFT loads it as a LoRA."""
        return {"lora_a": leaves["fa_a"], "lora_b": leaves["fa_b"]}

and `conf/lora/lorafa.yaml`, which names what differs from `conf/lora/_base.yaml`:

    # LoRA-FA: A is random and frozen (2308.03303).
    defaults:
      - _base
      - _self_

    method: lorafa

**Leaves.** `Leaf(axes, trained, shared)`: a letter for each axis (I in, O out, R rank). A leaf that is not trained is a
constant of the trial; a shared leaf is one array for all modules (VeRA). Leading axes of W are those of a stack of
kernels; use `self.shape(leaf, kernel, module)` and `...` in index expressions, and stacks work.

**The update.** Override one of `factors` (ΔW = s·A·B, never formed), `delta` (ΔW itself, as LoHa) and `adapted` (W as
adapted, as IA³; then set `additive = False`). The scale s is 0 where a trial of a pack does not adapt the module, and
the result must then be W. Work with jax arrays and numpy arrays alike. `apply` may be overridden for a cheaper product.

**What it cannot do** is said by class attributes, each with a comment in `base.py`: `paddable`, `stackable`,
`uses_alpha`, `one_rank`, `drops_input`. `check` returns the problems of settings. Settings of its own go into
`options` (a name and a default each) and are typed as `lora.options.NAME=VALUE`.

**Training.** `update_factors` scales the updates of some leaves (LoRA+), `wrap_optimizer` wraps the rule (AdaLoRA).

**PEFT.** `peft` is a `PeftFormat`: the tensors' names and the config's fields. Without one the method is written in the
format of `peft_name` with the arrays of `peft_leaves`; a method that PEFT cannot compute at all gives its own keys in a
`PeftFormat` and the reason in `peft_reason`, and its files are marked `"peft": false`.
'''

import pkgutil
from functools import cache
from importlib import import_module

from lora_exp.config import InputError, LoraConfig, did_you_mean
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
  """The name of every method: the files of this folder apart from `base`."""
  return tuple(sorted(file.name for file in pkgutil.iter_modules(__path__) if file.name != "base"))


@cache
def get(name: str) -> Method:
  """The method that the file `name` of this folder defines. Raises InputError if there is none, with the nearest."""
  if name not in names():
    raise InputError(f"lora.method={name}: choose {', '.join(names())}{did_you_mean(name, names())}")
  module = import_module(f"{__name__}.{name}")
  for kind in vars(module).values():
    if isinstance(kind, type) and issubclass(kind, Method) and kind.__module__ == module.__name__:
      return kind()
  raise TypeError(f"{module.__file__} defines no subclass of Method with name = {name!r}")


def every() -> tuple[Method, ...]:
  """All methods, by name."""
  return tuple(get(name) for name in names())


def of(config: LoraConfig) -> Method:
  """The method of these settings: that of lora.method, or of lora.init where that names one (PiSSA, OLoRA)."""
  return variant(config.method, config.init)


def variant(method: str, init: str) -> Method:
  """The method typed as lora.method=`method` lora.init=`init`. Raises InputError where these do not go together."""
  if init not in names() or get(init).init_of is None:
    return get(method)
  chosen = get(init)
  if method not in (chosen.init_of, chosen.name):
    raise InputError(f"lora.init={init}: goes with lora.method={chosen.init_of} alone, not with {method}")
  return chosen

"""What every method offers: its arrays, how they start, and what they do to a kernel.

W is a kernel (…, I, O) and x its input (…, I); leading axes of W are those of a stack of kernels. The default
implementation computes

    y = g ⊙ (x·W + s·(x·A)·B − s·(x·A₀)·B₀)

from `factors` (A, B), `start` (A₀, B₀) and `gate` (g). A method without thin factors overrides `delta` or `adapted`;
everything else (merging, the loss of an adapted head, embeddings, resizing, spectra, packing) follows from these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_exp.config import LoraConfig
from lora_exp.lora import matmul
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.initialization import is_abstract
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.lora.quantization import dense
from lora_exp.runtime.dropout import path_key

Array = Any
Leaves = Mapping[str, Array]  # the arrays of one adapted module by name, jax's or numpy's
Factors = tuple[Array, Array]  # A (…, I, R) and B (…, R, O)


class Leaf(NamedTuple):
  """One array that a method adds to a module."""

  axes: str  # a letter for each axis: I in, O out, R rank
  trained: bool = True  # or a constant
  shared: bool = False  # one array for all modules, as large as the largest of them; each takes the first of its axes


@dataclass(frozen=True)
class InitSettings:
  """What a user may choose about the start of an adapter."""

  init: str = "kaiming"  # a distribution of initialization.py
  std: float | None = None  # of init=normal
  options: Mapping[str, Any] = field(default_factory=dict)  # lora.options, checked by the method


@dataclass(frozen=True)
class Modules:
  """The modules that are about to be adapted, for `Method.init_all`."""

  rows: Sequence[AdaptedModule]
  fans: Mapping[str, int]  # by path: inputs that add up in one output of A (1 for a look-up)
  kernels: Mapping[str, Any]  # by path: W (…, I, O), perhaps quantised, or its shape alone


class Method:
  """A fine-tuning method. The object holds no arrays and no state; its file's name is what users type."""

  name: ClassVar[str]  # as typed in lora.method, and in files
  title: ClassVar[str]  # as papers spell it
  paper: ClassVar[str] = ""  # arXiv number
  cost: ClassVar[str] = ""  # trained parameters of a kernel (I, O) and anything unusual, in one sentence

  leaves: ClassVar[Mapping[str, Leaf]] = {}  # every array that a module may get
  init_of: ClassVar[str | None] = None  # the lora.method of which this is chosen by lora.init, as PiSSA is of lora

  adapts_kernels: ClassVar[bool] = True  # puts leaves beside the kernels of lora.targets
  trains_everything: ClassVar[bool] = False  # every parameter of the model is trained, and a whole model exported
  trains_nothing: ClassVar[bool] = False
  changes_kernels: ClassVar[bool] = True  # so that there is a ΔW to look into and to merge
  uses_alpha: ClassVar[bool] = True  # scale = alpha/rank; otherwise it is 1
  one_rank: ClassVar[bool] = False  # all modules have one rank
  stackable: ClassVar[bool] = True  # goes on stacks of kernels
  paddable: ClassVar[bool] = True  # zero columns of a rank stay zero in training: trials of other ranks share a pack
  drops_input: ClassVar[bool] = True  # lora.dropout drops inputs of the update
  additive: ClassVar[bool] = True  # W as adapted is W + ΔW, and ΔW does not depend on W
  has_lr_ratio: ClassVar[bool] = False  # lora.lr_ratio applies
  uses_budget: ClassVar[bool] = False  # lora.budget applies
  options: ClassVar[Mapping[str, Any]] = {}  # settings of its own in lora.options, with their defaults
  inspect_note: ClassVar[str | None] = None  # a sentence below task=inspect

  peft: ClassVar[PeftFormat | None] = None  # the format of its files in PEFT; None: see `peft_name` and `peft_leaves`
  peft_name: ClassVar[str] = "lora"  # without a format of its own: the method whose files it is written as

  # Sizes

  @property
  def uses_rank(self) -> bool:
    """Whether any leaf has a rank."""
    return any("R" in leaf.axes for leaf in self.leaves.values())

  @property
  def shared_leaves(self) -> tuple[str, ...]:
    """Names of the leaves that are one array for all modules."""
    return tuple(name for name, leaf in self.leaves.items() if leaf.shared)

  @property
  def has_constants(self) -> bool:
    """Whether its frozen arrays are more than the base's."""
    return any(not leaf.trained for leaf in self.leaves.values())

  @property
  def split_axes(self) -> dict[str, str]:
    """The axes of the trained factors, which a mesh splits as it splits the kernel beside them."""
    return {name: leaf.axes for name, leaf in self.leaves.items() if leaf.trained and leaf.axes in ("IR", "RO")}

  def leaf_names(self, path: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The leaves that the module at `path` gets; by default all of them."""
    return tuple(self.leaves)

  def trained_size(self, names: Sequence[str], module: AdaptedModule) -> int:
    """Trained parameters of one adapted kernel with these leaves."""
    sizes = module.sizes()
    shapes = [[sizes[axis] for axis in self.leaves[name].axes] for name in names if self.leaves[name].trained]
    return sum(int(np.prod(shape)) for shape in shapes)

  def rank_of(self, leaves: Leaves) -> int:
    """R of a module's arrays; 1 for a method without ranks."""
    for name, x in leaves.items():
      if name in self.leaves and "R" in (axes := self.leaves[name].axes):
        return x.shape[axes.index("R") - len(axes)]
    return 1

  def lead_of(self, leaves: Leaves) -> tuple[int, ...]:
    """The axes of a stack of kernels in a module's arrays."""
    name, x = next((name, x) for name, x in leaves.items() if name in self.leaves)
    return tuple(x.shape[: len(x.shape) - len(self.leaves[name].axes)])

  # The start

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """The leaves of every module before the first step, by path; calls `init` for each.

    `done` is called after each module that takes long.
    """
    started = {}
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      kernel = kernel if is_abstract(kernel) else dense(kernel)
      started[row.path] = self.init(path_key(key, row.path), kernel, row, settings)
    return started

  def init(self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings) -> dict[str, Array]:
    """The leaves of one module, with which it computes as its base. `kernel` is W, or its shape alone."""
    raise NotImplementedError(f"{self.name} defines neither init nor init_all")

  def shape(self, leaf: str, kernel: Array, module: AdaptedModule) -> tuple[int, ...]:
    """The shape of a leaf beside `kernel` (…, I, O), the axes of a stack first."""
    sizes = module.sizes()
    return (*kernel.shape[:-2], *(sizes[axis] for axis in self.leaves[leaf].axes))

  def complete(self, leaves: Leaves, kernel: Array) -> dict[str, Array]:
    """`leaves` read from a file with the constants that follow from W, which no file holds."""
    return dict(leaves)

  # What the leaves do to a kernel

  def factors(self, leaves: Leaves) -> Factors | None:
    """A and B where ΔW = s·A·B (− s·A₀·B₀), everything trained folded in; None where ΔW is no thin product."""
    return None

  def start(self, leaves: Leaves) -> Factors | None:
    """A₀ and B₀, which are subtracted; None where there are none."""
    return None

  def gate(self, kernel: Array, leaves: Leaves, scale: Array) -> Array | None:
    """g (…, O), which multiplies each output; None where there is none. 1 where the scale is 0."""
    return None

  def thin_product(self, leaves: Leaves) -> Factors | None:
    """A and B where s·A·B is all that is added to W; None if the kernel must be formed."""
    whole = self.additive and self.start(leaves) is None
    return self.factors(leaves) if whole else None

  def delta(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """ΔW (…, I, O) before the gate; a method that is `additive` ignores the kernel."""
    product = self.factors(leaves)
    if product is not None:
      return matmul.low_rank(*product, per_kernel(scale), self.start(leaves))
    if type(self).adapted is Method.adapted:
      raise NotImplementedError(f"{self.name} defines none of factors, delta and adapted")
    return self.adapted(kernel, leaves, scale) - kernel

  def adapted(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """W as adapted, g ⊙ (W + ΔW), in W's dtype; formed in the leaves'."""
    whole = kernel + self.delta(kernel, leaves, scale)
    g = self.gate(kernel, leaves, scale)
    return (whole if g is None else whole * g[..., None, :]).astype(kernel.dtype)

  def apply(
    self, x: Array, kernel: Array, leaves: Leaves, scale: Array, *, dropped: Array | None = None, compute: str = "auto"
  ) -> Array:
    """y (..., O) in x's dtype, for x (..., I) and one kernel (I, O), perhaps quantised.

    `dropped`: x after dropout, which the update takes instead of x. `compute`: lora.compute.
    """
    product, start = self.factors(leaves), self.start(leaves)
    if product is None:
      w = dense(kernel, x.dtype)
      # Below float32 a sum with W would round a small ΔW away.
      if dropped is None and (w.dtype == jnp.float32 or not self.additive):
        return x @ self.adapted(w, leaves, scale)
      y = x @ w + (x if dropped is None else dropped) @ self.delta(w, leaves, scale).astype(x.dtype)
    elif dropped is None:
      y = matmul.lora_dot(x, kernel, *product, scale, start, compute)
    else:
      y = matmul.dropped(x, dropped, kernel, *product, scale, start)
    g = self.gate(dense(kernel, next(iter(leaves.values())).dtype), leaves, scale)
    return y if g is None else y * g.astype(y.dtype)

  # Training

  def update_factors(self, trial: Any) -> optax.GradientTransformation:
    """A factor on the updates of some leaves, after the optimizer's rule; `trial` holds a trial's traced numbers."""
    return optax.identity()

  def wrap_optimizer(self, rule: optax.GradientTransformation, trial: Any) -> optax.GradientTransformation:
    """`rule` (the optimizer with its clipping) as this method uses it."""
    return rule

  def summary(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Further facts for summary.json about a trained adapter, whose arrays are numpy's."""
    return {}

  # Settings

  def facts(self) -> dict[str, Any]:
    """What a report needs to know, which the run writes to summary.json."""
    return {
      "name": self.name,
      "title": self.title,
      "reference": "upper" if self.trains_everything else "lower" if self.trains_nothing else None,
      "adapts_kernels": self.adapts_kernels,
      "uses_rank": self.uses_rank,
      "uses_alpha": self.uses_alpha,
      "has_constants": self.has_constants,
    }

  def check(self, config: LoraConfig) -> list[str]:
    """Problems of the group `lora` that only this method knows, a sentence each."""
    return []

  # PEFT's files

  def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Array]:
    """A module's arrays, numpy's, as the file's method has them; `needed`: the module must stay in the file."""
    return dict(leaves)

  def peft_fields(self, names: Mapping[str, str], leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Config fields that follow from the adapter; `names` are PEFT's of the modules."""
    return {}

  def peft_leaf_names(self, name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """The leaves that a file holds of the module that PEFT calls `name`; `values` is adapter_config.json."""
    return tuple(self.peft.keys) if self.peft else ()

  def peft_reason(self, modules: tuple[AdaptedModule, ...], leaves: Mapping[str, Leaves]) -> str | None:
    """Why PEFT cannot compute what this adapter does, which only the method knows; None if it can."""
    return None

  # Arithmetic of adapters

  def resize_problem(self, module: AdaptedModule, leaves: Leaves) -> str | None:
    """Why a module's adapter cannot be approximated at another rank; None if it can."""
    if self.additive:
      return None
    return f"{self.title} changes W by more than a sum; merge it and extract a LoRA instead"

  def resized(self, product: Leaves, leaves: Leaves) -> tuple[str, dict[str, Array]]:
    """(method, leaves) of an adapter whose ΔW became `product` (LoRA's leaves), out of its former leaves."""
    return "lora", dict(product)


def per_kernel(scale: Any) -> jax.Array:
  """The scale with two axes more, to multiply (…, I, O) or a factor."""
  return jnp.asarray(scale)[..., None, None]

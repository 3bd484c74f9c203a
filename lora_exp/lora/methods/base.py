"""The interface of a fine-tuning method: its leaves, their initialization, and their effect on a kernel.

W is a kernel (…, I, O) and x its input (…, I); leading axes of W are those of a stack of kernels. By default a method
computes

    y = g ⊙ (x·W + s·(x·A)·B − s·(x·A₀)·B₀)

from `factors` (A, B), `start` (A₀, B₀) and `gate` (g). A method without thin factors overrides `delta` or `adapted`;
everything else (merging, the loss of an adapted head, embeddings, resizing, spectra, packing) follows from these.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from lora_exp.lora import matmul
from lora_exp.lora.adapted_module import AdaptedModule
from lora_exp.lora.initialization import is_abstract
from lora_exp.lora.method_declaration import Leaf as Leaf  # methods import it from here
from lora_exp.lora.method_declaration import MethodDeclaration
from lora_exp.lora.peft_format import PeftFormat
from lora_exp.lora.quantization import dense
from lora_exp.runtime.dropout import path_key

Array = Any
Leaves = Mapping[str, Array]  # the arrays of one adapted module by leaf name, JAX or NumPy
Factors = tuple[Array, Array]  # A (…, I, R) and B (…, R, O)


@dataclass(frozen=True)
class InitSettings:
  """Settings of the initialization of an adapter."""

  init: str = "kaiming"  # lora.init: a distribution of initialization.py
  std: float | None = None  # lora.init_std, for init=normal
  options: Mapping[str, Any] = field(default_factory=dict)  # lora.options, checked by the method


@dataclass(frozen=True)
class Modules:
  """The modules to adapt, for `Method.init_all`."""

  rows: Sequence[AdaptedModule]
  fans: Mapping[str, int]  # path -> fan-in of A: I, or 1 for an embedding
  kernels: Mapping[str, Any]  # path -> W (…, I, O), which may be quantised or abstract


class Method(MethodDeclaration):
  """A fine-tuning method. The object holds no arrays and no state."""

  peft: ClassVar[PeftFormat | None] = None  # the file format in PEFT; None: see `peft_name` and `peft_leaves`
  peft_reads: ClassVar[PeftFormat | None] = None  # if `peft` is None: PEFT's format, which is only read
  peft_name: ClassVar[str] = "lora"  # if `peft` is None: the method as which files are written and read

  # Sizes

  @property
  def has_thin_factors(self) -> bool:
    """Whether ΔW is a thin product, so that its rank is at most that of the module (twice that with A₀ and B₀)."""
    return type(self).factors is not Method.factors

  def rank_of(self, leaves: Leaves) -> int:
    """Returns the rank of a module's leaves; 1 for a method without ranks."""
    for name, x in leaves.items():
      axes = self.leaves[name].axes if name in self.leaves else ""
      if "R" in axes:
        return x.shape[axes.index("R") - len(axes)]
    return 1

  def lead_of(self, leaves: Leaves) -> tuple[int, ...]:
    """Returns the leading axes of a module's leaves: those of the kernel before (I, O)."""
    name, x = next((name, x) for name, x in leaves.items() if name in self.leaves)
    return tuple(x.shape[: len(x.shape) - len(self.leaves[name].axes)])

  # Initialization

  def init_all(
    self, modules: Modules, key: jax.Array, settings: InitSettings, done: Callable[[], Any]
  ) -> dict[str, dict[str, jax.Array]]:
    """Initializes the leaves of every module, by path. The default calls `init` for each module.

    An override may call `done` after each module, to report progress.
    """
    initialized = {}
    for row in modules.rows:
      kernel = modules.kernels[row.path]
      kernel = kernel if is_abstract(kernel) else dense(kernel)
      initialized[row.path] = self.init(path_key(key, row.path), kernel, row, settings)
    return initialized

  def init(self, key: jax.Array, kernel: Array, module: AdaptedModule, settings: InitSettings) -> dict[str, Array]:
    """Initializes the leaves of one module, so that it computes the same as its base. `kernel` is W, or abstract."""
    raise NotImplementedError(f"{self.name} defines neither init nor init_all")

  def shape(self, leaf: str, kernel: Array, module: AdaptedModule) -> tuple[int, ...]:
    """Returns the shape of a leaf for `kernel` (…, I, O): the leading axes of the kernel, then the leaf's axes."""
    sizes = self.sizes(module)
    return (*kernel.shape[:-2], *(sizes[axis] for axis in self.leaves[leaf].axes))

  def complete(self, leaves: Leaves, kernel: Array, module: AdaptedModule) -> dict[str, Array]:
    """Returns `leaves` with the constants that files omit because they follow from the kernel W."""
    return dict(leaves)

  # The effect of the leaves on a kernel

  def factors(self, leaves: Leaves) -> Factors | None:
    """Returns A and B with ΔW = s·A·B (− s·A₀·B₀), other leaves multiplied in; None if ΔW has no thin factors."""
    return None

  def start(self, leaves: Leaves) -> Factors | None:
    """Returns A₀ and B₀, whose product is subtracted, or None."""
    return None

  def gate(self, kernel: Array, leaves: Leaves, scale: Array) -> Array | None:
    """Returns the gate g (…, O) that multiplies the outputs, or None. It must be 1 where the scale is 0."""
    return None

  def thin_product(self, leaves: Leaves) -> Factors | None:
    """Returns A and B if the adapted kernel is W + s·A·B without further terms; None otherwise."""
    if not self.additive or self.start(leaves) is not None:
      return None
    return self.factors(leaves)

  def delta(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """Returns ΔW (…, I, O) before the gate. An `additive` method ignores `kernel`."""
    product = self.factors(leaves)
    if product is not None:
      return matmul.low_rank(*product, per_kernel(scale), self.start(leaves))
    if type(self).adapted is Method.adapted:
      raise NotImplementedError(f"{self.name} defines none of factors, delta and adapted")
    return self.adapted(kernel, leaves, scale) - kernel

  def adapted(self, kernel: Array, leaves: Leaves, scale: Array) -> Array:
    """Returns the adapted kernel g ⊙ (W + ΔW), computed in the dtype of the leaves and cast to that of W."""
    updated = kernel + self.delta(kernel, leaves, scale)
    g = self.gate(kernel, leaves, scale)
    return (updated if g is None else updated * g[..., None, :]).astype(kernel.dtype)

  def apply(
    self, x: Array, kernel: Array, leaves: Leaves, scale: Array, *, dropped: Array | None = None, compute: str = "auto"
  ) -> Array:
    """Returns the output y (..., O) for x (..., I), in the dtype of x.

    `kernel` is one kernel (I, O), which may be quantised. `dropped` is x after dropout, which the update uses in place
    of x. `compute` is lora.compute.
    """
    product, start = self.factors(leaves), self.start(leaves)
    if product is None:
      w = dense(kernel, x.dtype)
      # In a dtype below float32, adding a small ΔW to W would round it away.
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
    """Returns a transformation that scales updates after the optimizer; `trial` holds traced hyperparameters."""
    return optax.identity()

  def wrap_optimizer(self, rule: optax.GradientTransformation, trial: Any) -> optax.GradientTransformation:
    """Returns `rule` (clipping and the optimizer), which a method may wrap in a transformation of its own."""
    return rule

  def summary(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Returns further entries of summary.json for a trained adapter with NumPy arrays, by module path."""
    return {}

  # Settings

  def facts(self) -> dict[str, Any]:
    """Returns the properties of the method that a run writes to summary.json, for reports."""
    return {
      "name": self.name,
      "title": self.title,
      "reference": "upper" if self.trains_everything else "lower" if self.trains_nothing else None,
      "adapts_kernels": self.adapts_kernels,
      "uses_rank": self.uses_rank,
      "uses_alpha": self.uses_alpha,
      "has_constants": self.has_constants,
    }

  # PEFT's files

  def peft_leaves(self, leaves: Leaves, needed: bool) -> dict[str, Array]:
    """Converts a module's leaves (NumPy) to those of `peft_name`. `needed`: the result must not be empty."""
    return dict(leaves)

  def peft_fields(self, names: Mapping[str, str], leaves: Mapping[str, Leaves]) -> dict[str, Any]:
    """Returns fields of adapter_config.json that depend on the adapter; `names` maps paths to PEFT's module names."""
    return {}

  def peft_leaf_names(self, name: str, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the leaves in a file for the module with PEFT's name `name`; `values` is adapter_config.json."""
    form = self.peft or self.peft_reads
    return tuple(form.keys) if form else ()

  def peft_reason(self, modules: tuple[AdaptedModule, ...], leaves: Mapping[str, Leaves]) -> str | None:
    """Returns a reason, specific to the method, why PEFT computes something else for this adapter, or None."""
    return None

  # Arithmetic of adapters

  def resize_problem(self, module: AdaptedModule, leaves: Leaves) -> str | None:
    """Returns the reason why a module's adapter cannot be resized to another rank, or None."""
    if self.additive:
      return None
    return f"{self.title} does not add an update to W; merge it and extract a LoRA instead"

  def resized(self, product: Leaves, leaves: Leaves) -> tuple[str, dict[str, Array]]:
    """Returns (method, leaves) after a resize, from the new factors `product` (LoRA leaves) and the old leaves."""
    return "lora", dict(product)


def per_kernel(scale: Any) -> jax.Array:
  """Returns the scale with two more axes, so that it broadcasts against (…, I, O)."""
  return jnp.asarray(scale)[..., None, None]

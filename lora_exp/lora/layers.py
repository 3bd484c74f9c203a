"""The adapter on each kind of NNX module: a subclass that the module becomes, with the adapter's leaves added.

The module object stays and its class changes, so base paths, sharing between parents and checkpoints do not. Every
kernel is seen as (in, out), after leading axes where it is a stack of kernels (lora/kernels.py).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.lora import initialization, kernels, methods
from lora_exp.lora.methods import Leaves, Method
from lora_exp.lora.methods.lora import LoRA
from lora_exp.lora.quantization import is_quantised
from lora_exp.runtime.dropout import DropKey, dropout, placeholder
from lora_exp.runtime.fusion import apart


class Hyper(nnx.Variable):
  """A number of a trial (scale, dropout rate) that enters the compiled step as an array."""


class Constant(nnx.Variable):
  """An array of an adapter that is not trained: what it started from, or random directions that it shares."""


class Trained(nnx.LoRAParam):
  """A parameter of the base itself (a bias, a norm, a whole module) that is trained in full, from the base's value."""


FROZEN_PREFIX = "frozen_"  # before the name of a parameter that is trained in full: the base's own, which stays


class AdapterLayer(nnx.Module):
  """What the adapted classes share; `method`, `compute` and `deterministic` are static, the rest are Variables."""

  scale: Hyper
  rate: Hyper
  key: DropKey
  method: str
  compute: str
  deterministic: bool

  @property
  def kind(self) -> Method:
    """The method whose leaves this module has."""
    return methods.get(self.method)

  def leaves(self) -> dict[str, Any]:
    """The adapter's arrays by the names of the method's leaves; shared ones cut to this module's inputs and outputs."""
    sizes = dict(zip("IO", kernels.shape(self), strict=True))
    arrays = {}
    for name, leaf in self.kind.leaves.items():
      if name in vars(self):
        x = getattr(self, name)[...]
        arrays[name] = x[tuple(slice(sizes.get(axis)) for axis in leaf.axes)] if leaf.shared else x
    return arrays

  def lead_scale(self) -> jax.Array:
    """The scale with an axis for each one before (I, O): a stack has as many as layers, and heads share theirs."""
    shared = len(kernels.lead(self)) - len(kernels.stack(self))
    return self.scale[...].reshape(*self.scale[...].shape, *[1] * shared)

  def adapted_product(self, x: jax.Array, w_IO: Any) -> jax.Array:
    """x (..., I) times the adapted kernel; the update's input is dropped where the layer is not deterministic."""
    dropped = None if self.deterministic else dropout(x, self.rate[...], self.key[...])
    y = self.kind.apply(x, w_IO, self.leaves(), self.scale[...], dropped=dropped, compute=self.compute)
    return apart(y)

  def adapted_kernel(self, w_IO: jax.Array) -> jax.Array:
    """The adapted kernel (…, I, O) in the dtype of `w_IO`."""
    return self.kind.adapted(w_IO, self.leaves(), self.lead_scale())

  def through_kernel(self, x: jax.Array, *args, **kwargs) -> jax.Array:
    """The base's own call with the adapted kernel: for modules that are no plain product of x and W."""
    w_IO, leaves, scale = kernels.to_IO(self, kernels.of(self)[...]), self.leaves(), self.lead_scale()
    if self.deterministic:
      return self._base_call(self.adapted_kernel(w_IO), True, x, *args, **kwargs)
    g = self.kind.gate(w_IO, leaves, scale)
    frozen, delta = w_IO, self.kind.delta(w_IO, leaves, scale)
    if g is not None:
      frozen, delta = frozen * g[..., None, :], delta * g[..., None, :]
    y = self._base_call(frozen.astype(w_IO.dtype), True, x, *args, **kwargs)
    x = dropout(x, self.rate[...], self.key[...])
    return y + self._base_call(delta.astype(w_IO.dtype), False, x, *args, **kwargs)

  def _base_call(self, w_IO: jax.Array, bias: bool, *args, **kwargs) -> jax.Array:
    """The base class's call with another kernel, on a view of this module: nothing here is written to."""
    kind = base_class(self)
    view: Any = object.__new__(kind)
    vars(view).update(vars(self))
    vars(view)["kernel"] = nnx.Param(kernels.from_IO(self, w_IO))
    if not bias:
      vars(view)["bias"] = None
    return kind.__call__(view, *args, **kwargs)


class LoRALinear(AdapterLayer, nnx.Linear):
  """`nnx.Linear` with an adapter: what `inject` turns one into, or written from the start in a model of your own.

  `inject` does not call the constructor; the keyword arguments that it does not name are those of `nnx.Linear`.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rank: int = 8,
    alpha: float | None = None,
    init: str = "kaiming",
    rngs: nnx.Rngs,
    **linear,
  ):
    super().__init__(in_features, out_features, rngs=rngs, **linear)
    a_IR = initialization.draw_a(rngs.params(), init, in_features, in_features, rank)
    leaves = {"lora_a": a_IR, "lora_b": jnp.zeros((rank, out_features))}
    _add_leaves(self, LoRA.name, leaves, 2.0 if alpha is None else alpha / rank)

  def __call__(self, x, out_sharding=None):
    kernel = self.kernel.get_value()
    if is_quantised(kernel):
      x, bias = self.promote_dtype((x, _value(self.bias)), dtype=self.dtype)
    else:
      x, kernel, bias = self.promote_dtype((x, kernel, _value(self.bias)), dtype=self.dtype)
    y = self.adapted_product(x, kernel)
    return y if bias is None else y + bias


class LoRALinearGeneral(AdapterLayer, nnx.LinearGeneral):
  """`nnx.LinearGeneral` (of `nnx.MultiHeadAttention`) with an adapter: contracted axes are I, the rest O."""

  def __call__(self, x, out_sharding=None):
    if self.batch_axis:
      return self.through_kernel(x)
    x, kernel, bias = self.promote_dtype((x, self.kernel[...], _value(self.bias)), dtype=self.dtype)
    axes = [a % x.ndim for a in kernels.as_tuple(self.axis)]
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    lead = x.shape[: -len(axes)]
    y = self.adapted_product(x.reshape(*lead, -1), kernels.to_IO(self, kernel))
    y = y.reshape(*lead, *kernels.as_tuple(self.out_features))
    return y if bias is None else y + bias


class LoRAEinsum(AdapterLayer, nnx.Einsum):
  """`nnx.Einsum` with an adapter: labels that x and the kernel alone share are I, the kernel's own O."""

  def __call__(self, inputs, einsum_str=None, out_sharding=None):
    return self.through_kernel(inputs, einsum_str)


class LoRAConv(AdapterLayer, nnx.Conv):
  """`nnx.Conv` with an adapter: the window and its channels are I, the output channels O."""

  def __call__(self, inputs, out_sharding=None):
    return self.through_kernel(inputs)


class LoRAEmbed(AdapterLayer, nnx.Embed):
  """`nnx.Embed` with an adapter seen by its look-up and its tied head (`attend`); as in PEFT, nothing is dropped."""

  def __call__(self, inputs, out_sharding=None):
    table, leaves, scale = self.embedding[...], self.leaves(), self.scale[...]
    product = self.kind.factors(leaves)
    if product is None:
      return jnp.take(self.promote_dtype((self.adapted_kernel(table),), dtype=self.dtype)[0], inputs, axis=0)
    g = self.kind.gate(table, leaves, scale)
    table, a, b = self.promote_dtype((table, *product), dtype=self.dtype)
    scale = scale.astype(table.dtype)
    y = (scale * jnp.take(a, inputs, axis=0)) @ b
    if (start := self.kind.start(leaves)) is not None:
      start_a, start_b = (x.astype(table.dtype) for x in start)
      y = y - (scale * jnp.take(start_a, inputs, axis=0)) @ start_b
    y = jnp.take(table, inputs, axis=0) + y
    return y if g is None else y * g.astype(y.dtype)

  def attend(self, query, out_sharding=None):
    leaves = self.leaves()
    product = self.kind.factors(leaves)
    if product is None:
      table, query = self.promote_dtype((self.adapted_kernel(self.embedding[...]), query), dtype=self.dtype)
      return query @ table.T
    g = self.kind.gate(self.embedding[...], leaves, self.scale[...])
    if g is not None:
      query = query * g.astype(query.dtype)
    table, query = self.promote_dtype((self.embedding[...], query), dtype=self.dtype)
    y = self._attend_thin(query, *product)
    if (start := self.kind.start(leaves)) is not None:
      y = y - self._attend_thin(query, *start)
    return query @ table.T + y

  def _attend_thin(self, query: jax.Array, a_VR: jax.Array, b_RD: jax.Array) -> jax.Array:
    """s·(query·Bᵀ)·Aᵀ (..., V)."""
    scale = self.scale[...].astype(query.dtype)
    return (scale * (query @ b_RD.astype(query.dtype).T)) @ a_VR.astype(query.dtype).T


LORA_CLASSES: dict[type, type] = {
  nnx.Linear: LoRALinear,
  nnx.LinearGeneral: LoRALinearGeneral,
  nnx.Einsum: LoRAEinsum,
  nnx.Conv: LoRAConv,
  nnx.Embed: LoRAEmbed,
}


def _value(variable):
  return None if variable is None else variable[...]


def adaptable(module) -> bool:
  """Whether `module` is of a kind that can carry an adapter (exact types: an adapted module is not adapted twice)."""
  return type(module) in LORA_CLASSES and (not isinstance(module, nnx.Einsum) or module.einsum_str is not None)


def base_class(module) -> type:
  """The class that an adapted module had before."""
  return next(kind for kind, adapted in LORA_CLASSES.items() if adapted is type(module))


def attach(module, method: str, leaves: Leaves, scale: float, compute: str = "auto") -> None:
  """Turns `module` into its adapted class in place, with the leaves of `method` and the scale given.

  A leaf that is a Variable already (one that modules share) is kept as it is, and so stays shared.
  """
  # nnx's own __setattr__ would record the class as static data, and the graph would never equal the base's again.
  object.__setattr__(module, "__class__", LORA_CLASSES[type(module)])
  _add_leaves(module, method, leaves, scale, compute)


def _add_leaves(module, method: str, leaves: Leaves, scale: float, compute: str = "auto") -> None:
  declared = methods.get(method).leaves
  for name, x in leaves.items():
    kind = nnx.LoRAParam if declared[name].trained else Constant
    setattr(module, name, x if isinstance(x, nnx.Variable) else kind(jnp.asarray(x)))
  # A stack of kernels is cut by the scan that runs it, and so must be every number beside them.
  stack = kernels.stack(module)
  module.scale = Hyper(jnp.full(stack, scale, jnp.float32))
  module.rate = Hyper(jnp.full(stack, 0, jnp.float32))
  module.key = placeholder() if not stack else DropKey(jnp.broadcast_to(jax.random.key(0), stack))
  module.method, module.compute, module.deterministic = method, compute, True


def detach(module) -> None:
  """Takes the adapter off again; graph and state equal the base's."""
  for name in (*module.kind.leaves, "scale", "rate", "key", "method", "compute", "deterministic"):
    if name in vars(module):
      delattr(module, name)
  object.__setattr__(module, "__class__", base_class(module))

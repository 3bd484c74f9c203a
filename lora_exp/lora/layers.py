"""Adapted versions of the NNX layers: subclasses of Linear, LinearGeneral, Einsum, Conv and Embed.

`attach` changes the class of an existing module and adds the adapter's leaves. The module object stays the same, so
parameter paths, sharing between parents and checkpoints do not change. Kernels are viewed as (…, I, O), as in
`lora/kernels.py`.
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
  """A hyperparameter of a trial (scale, dropout rate), which is an array so that the step need not recompile."""


class Constant(nnx.Variable):
  """An array of an adapter that is not trained, such as A₀ of PiSSA or the shared random matrices of VeRA."""


class Trained(nnx.LoRAParam):
  """A parameter of the base (a bias, a norm, a complete module) that is trained in full, from the base's value."""


FROZEN_PREFIX = "frozen_"  # prefix under which the base's value of a fully trained parameter stays in the module


class AdapterLayer(nnx.Module):
  """Base class of the adapted layers.

  `method`, `compute` and `deterministic` are static attributes; `scale`, `rate` (of dropout) and `key` are Variables.
  """

  scale: Hyper
  rate: Hyper
  key: DropKey
  method: str
  compute: str
  deterministic: bool

  @property
  def kind(self) -> Method:
    """The method of the adapter."""
    return methods.get(self.method)

  def leaves(self) -> dict[str, Any]:
    """Returns the adapter's arrays by leaf name; shared leaves are cut to this module's I and O."""
    sizes = dict(zip("IO", kernels.shape(self), strict=True))
    arrays = {}
    for name, leaf in self.kind.leaves.items():
      if name in vars(self):
        x = getattr(self, name)[...]
        arrays[name] = x[tuple(slice(sizes.get(axis)) for axis in leaf.axes)] if leaf.shared else x
    return arrays

  def lead_scale(self) -> jax.Array:
    """Returns the scale with one axis for each axis before (I, O): one value per layer of a stack, shared by heads."""
    batch_axes = len(kernels.lead(self)) - len(kernels.stack(self))
    return self.scale[...].reshape(*self.scale[...].shape, *[1] * batch_axes)

  def adapted_product(self, x: jax.Array, w_IO: Any) -> jax.Array:
    """Returns x (..., I) times the adapted kernel; dropout on the update's input unless `deterministic`."""
    dropped = None if self.deterministic else dropout(x, self.rate[...], self.key[...])
    y = self.kind.apply(x, w_IO, self.leaves(), self.scale[...], dropped=dropped, compute=self.compute)
    return apart(y)

  def adapted_kernel(self, w_IO: jax.Array) -> jax.Array:
    """Returns the adapted kernel (…, I, O) in the dtype of `w_IO`."""
    return self.kind.adapted(w_IO, self.leaves(), self.lead_scale())

  def through_kernel(self, x: jax.Array, *args, **kwargs) -> jax.Array:
    """Calls the base class with the adapted kernel; for layers that are not a plain product of x and W."""
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
    """Calls the base class with another kernel, on a copy of this module's attributes; `bias`: with the bias."""
    cls = base_class(self)
    view: Any = object.__new__(cls)
    vars(view).update(vars(self))
    vars(view)["kernel"] = nnx.Param(kernels.from_IO(self, w_IO))
    if not bias:
      vars(view)["bias"] = None
    return cls.__call__(view, *args, **kwargs)


class LoRALinear(AdapterLayer, nnx.Linear):
  """`nnx.Linear` with a LoRA adapter, for `inject` (which does not call the constructor) or for direct use in a model.

  `init` is a distribution of A; B is zero. The scale is alpha/rank. Other keyword arguments are those of `nnx.Linear`.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    init: str = "kaiming",
    rngs: nnx.Rngs,
    **linear,
  ):
    super().__init__(in_features, out_features, rngs=rngs, **linear)
    a_IR = initialization.draw_a(rngs.params(), init, in_features, in_features, rank)
    leaves = {"lora_a": a_IR, "lora_b": jnp.zeros((rank, out_features))}
    _add_leaves(self, LoRA.name, leaves, alpha / rank)

  def __call__(self, x, out_sharding=None):
    kernel = self.kernel.get_value()
    if is_quantised(kernel):
      x, bias = self.promote_dtype((x, _value(self.bias)), dtype=self.dtype)
    else:
      x, kernel, bias = self.promote_dtype((x, kernel, _value(self.bias)), dtype=self.dtype)
    y = self.adapted_product(x, kernel)
    return y if bias is None else y + bias


class LoRALinearGeneral(AdapterLayer, nnx.LinearGeneral):
  """`nnx.LinearGeneral` (used by `nnx.MultiHeadAttention`) with an adapter; contracted axes are I, the others O."""

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
  """`nnx.Einsum` with an adapter; labels of x and the kernel that the output lacks are I, labels not in x are O."""

  def __call__(self, inputs, einsum_str=None, out_sharding=None):
    return self.through_kernel(inputs, einsum_str)


class LoRAConv(AdapterLayer, nnx.Conv):
  """`nnx.Conv` with an adapter; the window and the input channels are I, the output channels are O."""

  def __call__(self, inputs, out_sharding=None):
    return self.through_kernel(inputs)


class LoRAEmbed(AdapterLayer, nnx.Embed):
  """`nnx.Embed` with an adapter, which applies to the look-up and to `attend`. As in PEFT, there is no dropout."""

  def __call__(self, inputs, out_sharding=None):
    table, leaves, scale = self.embedding[...], self.leaves(), self.scale[...]
    product = self.kind.factors(leaves)
    if product is None:
      return jnp.take(self.promote_dtype((self.adapted_kernel(table),), dtype=self.dtype)[0], inputs, axis=0)
    g = self.kind.gate(table, leaves, scale)
    table, a, b = self.promote_dtype((table, *product), dtype=self.dtype)
    scale = scale.astype(table.dtype)
    y = (scale * jnp.take(a, inputs, axis=0)) @ b
    start = self.kind.start(leaves)
    if start is not None:
      start_a, start_b = (x.astype(table.dtype) for x in start)
      y = y - (scale * jnp.take(start_a, inputs, axis=0)) @ start_b
    y = jnp.take(table, inputs, axis=0) + y
    return y if g is None else y * g.astype(y.dtype)

  def attend(self, query, out_sharding=None):
    """Returns the logits (..., V) of a tied head for `query` (..., D)."""
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
    start = self.kind.start(leaves)
    if start is not None:
      y = y - self._attend_thin(query, *start)
    return query @ table.T + y

  def _attend_thin(self, query: jax.Array, a_VR: jax.Array, b_RD: jax.Array) -> jax.Array:
    """Returns s·(query·Bᵀ)·Aᵀ (..., V) for a query (..., D)."""
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
  """The array of a Variable, or None."""
  return None if variable is None else variable[...]


def adaptable(module) -> bool:
  """Whether `module` can get an adapter. Its type must match exactly, so that no module is adapted twice."""
  return type(module) in LORA_CLASSES and (not isinstance(module, nnx.Einsum) or module.einsum_str is not None)


def base_class(module) -> type:
  """Returns the class that an adapted module had before `attach`."""
  return next(base for base, adapted in LORA_CLASSES.items() if adapted is type(module))


def attach(module, method: str, leaves: Leaves, scale: float, compute: str = "auto") -> None:
  """Changes `module` to its adapted class, in place, with these leaves of `method`.

  A leaf that is a Variable is not copied, so that modules can share it.
  """
  # The __setattr__ of nnx would record the class as static data, which would remain in the graph after `detach`.
  object.__setattr__(module, "__class__", LORA_CLASSES[type(module)])
  _add_leaves(module, method, leaves, scale, compute)


def _add_leaves(module, method: str, leaves: Leaves, scale: float, compute: str = "auto") -> None:
  """Adds the Variables and static attributes of `AdapterLayer` to `module`."""
  declared = methods.get(method).leaves
  for name, x in leaves.items():
    variable_type = nnx.LoRAParam if declared[name].trained else Constant
    setattr(module, name, x if isinstance(x, nnx.Variable) else variable_type(jnp.asarray(x)))
  # `nnx.scan` slices every Variable of a stack of kernels, so that these need the axes of the stack too.
  stack = kernels.stack(module)
  module.scale = Hyper(jnp.full(stack, scale, jnp.float32))
  module.rate = Hyper(jnp.full(stack, 0, jnp.float32))
  module.key = placeholder() if not stack else DropKey(jnp.broadcast_to(jax.random.key(0), stack))
  module.method, module.compute, module.deterministic = method, compute, True


def detach(module) -> None:
  """Removes the adapter from `module` in place; graph and state are the base's again."""
  for name in (*module.kind.leaves, "scale", "rate", "key", "method", "compute", "deterministic"):
    if name in vars(module):
      delattr(module, name)
  object.__setattr__(module, "__class__", base_class(module))

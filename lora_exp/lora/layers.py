"""The adapter on each kind of NNX module: a subclass that the module becomes, with A, B and the scale added.

The module object stays and its class changes, so base paths, sharing between parents and checkpoints do not. Every
kernel is seen as (in, out): `a_IR` (in, rank), `b_RO` (rank, out), y = x·W + scale·(x·A)·B.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.dropout import DropKey, dropout, placeholder
from lora_exp.lora import product


class Hyper(nnx.Variable):
  """A number of an arm (scale, dropout rate) that enters the compiled step as an array."""


class Adapter(nnx.Module):
  """What the adapted classes share; `compute` and `deterministic` are static, everything else is a Variable."""

  lora_a: nnx.LoRAParam
  lora_b: nnx.LoRAParam
  scale: Hyper
  rate: Hyper
  key: DropKey
  compute: str
  deterministic: bool

  def adapted(self, x: jax.Array, w_IO: jax.Array) -> jax.Array:
    """x·W + scale·(dropout(x)·A)·B for x (..., I)."""
    a, b, scale = self.lora_a[...], self.lora_b[...], self.scale[...]
    if self.deterministic:
      return product.lora_dot(x, w_IO, a, b, scale, self.compute)
    return product.dropped(x, dropout(x, self.rate[...], self.key[...]), w_IO, a, b, scale)

  def update_IO(self) -> jax.Array:
    """scale·A·B, what the adapter adds to the kernel."""
    return self.scale[...] * (self.lora_a[...] @ self.lora_b[...])


class LoRALinear(Adapter, nnx.Linear):
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
    a_IR = draw_a(rngs.params(), init, in_features, in_features, rank)
    _adapt(self, a_IR, jnp.zeros((rank, out_features)), 2.0 if alpha is None else alpha / rank)

  def __call__(self, x, out_sharding=None):
    x, kernel, bias = self.promote_dtype((x, self.kernel[...], _value(self.bias)), dtype=self.dtype)
    y = self.adapted(x, kernel)
    return y if bias is None else y + bias


class LoRALinearGeneral(Adapter, nnx.LinearGeneral):
  """`nnx.LinearGeneral` (of `nnx.MultiHeadAttention`) with an adapter: contracted axes are I, the rest O."""

  def __call__(self, x, out_sharding=None):
    x, kernel, bias = self.promote_dtype((x, self.kernel[...], _value(self.bias)), dtype=self.dtype)
    axes = [a % x.ndim for a in _axes(self.axis)]
    x = jnp.moveaxis(x, axes, range(-len(axes), 0))
    lead = x.shape[: -len(axes)]
    y = self.adapted(x.reshape(*lead, -1), kernel.reshape(kernel_shape(self)))
    y = y.reshape(*lead, *_axes(self.out_features))
    return y if bias is None else y + bias


class LoRAEmbed(Adapter, nnx.Embed):
  """`nnx.Embed` with an adapter seen by its look-up and its tied head (`attend`); as in PEFT, nothing is dropped."""

  def __call__(self, inputs, out_sharding=None):
    table, a, b = self.promote_dtype((self.embedding[...], self.lora_a[...], self.lora_b[...]), dtype=self.dtype)
    h = self.scale[...].astype(table.dtype) * jnp.take(a, inputs, axis=0)
    return jnp.take(table, inputs, axis=0) + h @ b

  def attend(self, query, out_sharding=None):
    query, table = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
    a, b = self.lora_a[...].astype(query.dtype), self.lora_b[...].astype(query.dtype)
    return query @ table.T + (self.scale[...].astype(query.dtype) * (query @ b.T)) @ a.T


ADAPTED: dict[type, type] = {
  nnx.Linear: LoRALinear,
  nnx.LinearGeneral: LoRALinearGeneral,
  nnx.Embed: LoRAEmbed,
}


def _value(variable):
  return None if variable is None else variable[...]


def _axes(axis) -> tuple[int, ...]:
  return (axis,) if isinstance(axis, int) else tuple(axis)


def adaptable(module) -> bool:
  """Whether `module` is of a kind that can carry an adapter (exact types: an adapted module is not adapted twice)."""
  return type(module) in ADAPTED and not (isinstance(module, nnx.LinearGeneral) and module.batch_axis)


def kernel_shape(module) -> tuple[int, int]:
  """(in, out) of a module's kernel; for an embedding (vocabulary, features)."""
  if isinstance(module, nnx.Embed):
    return module.num_embeddings, module.features
  if isinstance(module, nnx.LinearGeneral):
    return math.prod(_axes(module.in_features)), math.prod(_axes(module.out_features))
  return module.in_features, module.out_features


def fan_in(module) -> int:
  """Inputs that add up in one output of A: the kernel's `in`, or 1 for a look-up."""
  return 1 if isinstance(module, nnx.Embed) else kernel_shape(module)[0]


def attach(module, a_IR: jax.Array, b_RO: jax.Array, scale: float, compute: str = "auto") -> None:
  """Turns `module` into its adapted class in place, with A, B and the scale given."""
  # nnx's own __setattr__ would record the class as static data, and the graph would never equal the base's again.
  object.__setattr__(module, "__class__", ADAPTED[type(module)])
  _adapt(module, a_IR, b_RO, scale, compute)


def _adapt(module, a_IR: jax.Array, b_RO: jax.Array, scale: float, compute: str = "auto") -> None:
  module.lora_a, module.lora_b = nnx.LoRAParam(a_IR), nnx.LoRAParam(b_RO)
  module.scale, module.rate = Hyper(jnp.float32(scale)), Hyper(jnp.float32(0))
  module.key, module.compute, module.deterministic = placeholder(), compute, True


def detach(module) -> None:
  """Takes the adapter off again; graph and state equal the base's."""
  for name in ("lora_a", "lora_b", "scale", "rate", "key", "compute", "deterministic"):
    delattr(module, name)
  object.__setattr__(module, "__class__", base_class(module))


def base_class(module) -> type:
  """The class that an adapted module had before."""
  return next(kind for kind, adapted in ADAPTED.items() if adapted is type(module))


def _uniform(bound: Callable[[int, int], float]):
  return lambda key, shape, fan, rank, std: jax.random.uniform(key, shape, jnp.float32, -1, 1) * bound(fan, rank)


INITS: dict[str, Callable[..., jax.Array]] = {
  "kaiming": _uniform(lambda fan, rank: 1 / math.sqrt(fan)),  # PEFT's: kaiming_uniform with a = sqrt(5)
  "he_uniform": _uniform(lambda fan, rank: math.sqrt(6 / fan)),  # flax's and the JAX tutorial's
  "xavier_uniform": _uniform(lambda fan, rank: math.sqrt(6 / (fan + rank))),  # penzai's
  "normal": lambda key, shape, fan, rank, std: jax.random.normal(key, shape) * (std or 1 / math.sqrt(rank)),
}


def draw_a(key: jax.Array, init: str, fan: int, features: int, rank: int, std: float | None = None) -> jax.Array:
  """A (features, rank), drawn as (rank, features): the first r columns do not depend on how many follow.

  So an arm padded to a larger rank starts as it would alone, and rank 4 as the first half of rank 8.
  """
  return INITS[init](key, (rank, features), fan, rank, std).T

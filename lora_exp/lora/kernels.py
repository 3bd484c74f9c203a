"""Every kernel seen as (in, out): which axes of a module's kernel are contracted, and which it gives."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def of(module) -> nnx.Variable:
  """The Variable with the kernel; of an embedding its table (vocabulary, features)."""
  return module.embedding if isinstance(module, nnx.Embed) else module.kernel


def as_tuple(value) -> tuple[int, ...]:
  """An axis or a size, or several, as a tuple."""
  return (value,) if isinstance(value, int) else tuple(value)


def _axes(module) -> tuple[list[int], list[int], list[int]]:
  """Axes of one kernel (not of a stack of them): one product each, contracted, given."""
  if isinstance(module, nnx.Einsum):
    x, kernel, y = _labels(module.einsum_str)
    batch = [i for i, c in enumerate(kernel) if c in x and c in y]
    given = [i for i, c in enumerate(kernel) if c not in x]
    return batch, [i for i in range(len(kernel)) if i not in batch and i not in given], given
  if isinstance(module, nnx.LinearGeneral):
    axes = list(range(_ndim(module)))
    ins, outs = len(module.batch_axis), len(module.batch_axis) + len(as_tuple(module.in_features))
    return axes[:ins], axes[ins:outs], axes[outs:]
  return [], list(range(_ndim(module) - 1)), [_ndim(module) - 1]


def _labels(equation: str) -> tuple[str, str, str]:
  inputs, y = equation.replace(" ", "").split("->")
  x, kernel = inputs.split(",")
  return x, kernel, y


def _ndim(module) -> int:
  """Axes of one kernel of the module, by its own settings."""
  if isinstance(module, nnx.Einsum):
    return len(_labels(module.einsum_str)[1])
  if isinstance(module, nnx.LinearGeneral):
    return len(module.batch_axis) + len(as_tuple(module.in_features)) + len(as_tuple(module.out_features))
  return len(module.kernel_size) + 2 if isinstance(module, nnx.Conv) else 2


def stack(module) -> tuple[int, ...]:
  """Leading axes of a stack of kernels (layers that are scanned over); () of a single one."""
  shape_ = of(module).get_value().shape
  return tuple(shape_[: len(shape_) - _ndim(module)])


def lead(module) -> tuple[int, ...]:
  """Axes before (I, O): those of the stack, and those along which each product has a kernel of its own."""
  shape_ = of(module).get_value().shape[len(stack(module)) :]
  return (*stack(module), *(shape_[i] for i in _axes(module)[0]))


def shape(module) -> tuple[int, int]:
  """(in, out) of one kernel; for an embedding (vocabulary, features)."""
  _, ins, outs = _axes(module)
  sizes = of(module).get_value().shape[len(stack(module)) :]
  return math.prod(sizes[i] for i in ins), math.prod(sizes[i] for i in outs)


def fan_in(module) -> int:
  """Inputs that add up in one output of A: the kernel's `in`, or 1 for a look-up."""
  return 1 if isinstance(module, nnx.Embed) else shape(module)[0]


def to_IO(module, kernel: Any) -> jax.Array:
  """The kernel (or an array of its shape) as (…, I, O)."""
  order = _order(module)
  if kernel.ndim == 2 and order == [0, 1]:
    return kernel
  return jnp.transpose(kernel, order).reshape(*lead(module), *shape(module))


def from_IO(module, w_IO: jax.Array) -> jax.Array:
  """The inverse of `to_IO`."""
  sizes, order = of(module).get_value().shape, _order(module)
  if w_IO.ndim == 2 and order == [0, 1]:
    return w_IO
  back = sorted(range(len(order)), key=lambda i: order[i])
  return jnp.transpose(w_IO.reshape([sizes[i] for i in order]), back)


def _order(module) -> list[int]:
  n = len(stack(module))
  batch, ins, outs = _axes(module)
  return [*range(n), *(n + i for i in (*batch, *ins, *outs))]

"""Kernels of NNX modules viewed as (…, I, O).

I are the contracted axes of a kernel, O the axes that its output adds. Leading axes are those of a stack of kernels,
and batch axes along which each product has its own kernel.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


def of(module) -> nnx.Variable:
  """Returns the Variable of the module's kernel; for an embedding, its table (vocabulary, features)."""
  return module.embedding if isinstance(module, nnx.Embed) else module.kernel


def as_tuple(value) -> tuple[int, ...]:
  """Returns an int or a sequence of ints as a tuple."""
  return (value,) if isinstance(value, int) else tuple(value)


def _axes(module) -> tuple[list[int], list[int], list[int]]:
  """(batch, contracted, output) axes of one kernel, without the axes of a stack."""
  if isinstance(module, nnx.Einsum):
    x, kernel, y = _labels(module.einsum_str)
    batch = [i for i, label in enumerate(kernel) if label in x and label in y]
    outputs = [i for i, label in enumerate(kernel) if label not in x]
    contracted = [i for i in range(len(kernel)) if i not in batch and i not in outputs]
    return batch, contracted, outputs
  if isinstance(module, nnx.LinearGeneral):
    axes = list(range(_ndim(module)))
    first_in = len(module.batch_axis)
    first_out = first_in + len(as_tuple(module.in_features))
    return axes[:first_in], axes[first_in:first_out], axes[first_out:]
  last = _ndim(module) - 1
  return [], list(range(last)), [last]


def _labels(equation: str) -> tuple[str, str, str]:
  """The labels of the input, the kernel and the output in an einsum equation."""
  operands, y = equation.replace(" ", "").split("->")
  x, kernel = operands.split(",")
  return x, kernel, y


def _ndim(module) -> int:
  """The number of axes of one kernel, without the axes of a stack."""
  if isinstance(module, nnx.Einsum):
    return len(_labels(module.einsum_str)[1])
  if isinstance(module, nnx.LinearGeneral):
    return len(module.batch_axis) + len(as_tuple(module.in_features)) + len(as_tuple(module.out_features))
  return len(module.kernel_size) + 2 if isinstance(module, nnx.Conv) else 2


def stack(module) -> tuple[int, ...]:
  """Returns the leading axes of a stack of kernels (layers that are scanned over); () for a single kernel."""
  sizes = of(module).get_value().shape
  return tuple(sizes[: len(sizes) - _ndim(module)])


def lead(module) -> tuple[int, ...]:
  """Returns the axes before (I, O): those of the stack, then the batch axes."""
  sizes = of(module).get_value().shape[len(stack(module)) :]
  return (*stack(module), *(sizes[i] for i in _axes(module)[0]))


def shape(module) -> tuple[int, int]:
  """Returns (I, O) of one kernel; for an embedding (vocabulary, features)."""
  _, contracted, outputs = _axes(module)
  sizes = of(module).get_value().shape[len(stack(module)) :]
  return math.prod(sizes[i] for i in contracted), math.prod(sizes[i] for i in outputs)


def fan_in(module) -> int:
  """Returns the fan-in of A: I, or 1 for an embedding, which looks up single rows."""
  return 1 if isinstance(module, nnx.Embed) else shape(module)[0]


def to_IO(module, kernel: Any) -> jax.Array:
  """Transposes and reshapes the module's kernel, or an array of the same shape, to (…, I, O)."""
  order = _order(module)
  if kernel.ndim == 2 and order == [0, 1]:
    return kernel
  return jnp.transpose(kernel, order).reshape(*lead(module), *shape(module))


def from_IO(module, w_IO: jax.Array) -> jax.Array:
  """The inverse of `to_IO`."""
  sizes, order = of(module).get_value().shape, _order(module)
  if w_IO.ndim == 2 and order == [0, 1]:
    return w_IO
  inverse = sorted(range(len(order)), key=order.__getitem__)
  return jnp.transpose(w_IO.reshape([sizes[i] for i in order]), inverse)


def _order(module) -> list[int]:
  """The permutation that sorts the kernel's axes into stack, batch, contracted, output."""
  n = len(stack(module))
  batch, contracted, outputs = _axes(module)
  return [*range(n), *(n + i for i in (*batch, *contracted, *outputs))]

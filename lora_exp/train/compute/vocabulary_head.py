"""The output projection of a model as arrays, which the loss and a teacher use, and its products."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lora_exp.lora import matmul
from lora_exp.lora.layers import AdapterLayer, Trained
from lora_exp.lora.quantization import dense

Array = jax.Array


class Table(NamedTuple):
  """The kernel of a tied head: the embedding table E (V, D), whose transpose would need a copy of it in each step."""

  embedding: Any


class Head(NamedTuple):
  """The arrays of an output projection x·(W + s·A·B) + bias; None for parts that the head does not have.

  A tied head is the transposed table: for E + s·A·B with A (V, R) and B (R, D), W is Eᵀ, `a` is Bᵀ, `b` is Aᵀ.
  """

  kernel: Any  # W (D, V), or a `Table`
  bias: Any = None  # (V,)
  a: Any = None  # (D, R)
  b: Any = None  # (R, V)
  scale: Any = None


def trains(module) -> tuple[bool, bool]:
  """Returns whether the head's kernel (or a kernel formed from it) and its bias need a gradient."""
  kernel = module.embedding if isinstance(module, nnx.Embed) else module.kernel
  bias = getattr(module, "bias", None)
  return isinstance(kernel, Trained) or forms_kernel(module), isinstance(bias, Trained)


def forms_kernel(module) -> bool:
  """Whether the update of an adapted head is not a single product of thin factors (DoRA, PiSSA, LoHa).

  The adapted kernel is then formed, and automatic differentiation propagates its gradient to the adapter.
  """
  return isinstance(module, AdapterLayer) and module.kind.thin_product(module.leaves()) is None


def head_of(module, x_BTD: Array) -> Head:
  """Returns the arrays of the head `module`, with the kernel in the dtype of computation."""
  tied, dtype = isinstance(module, nnx.Embed), module.dtype or x_BTD.dtype
  table = dense((module.embedding if tied else module.kernel).get_value(), dtype).astype(dtype)
  bias = None if tied or module.bias is None else module.bias[...]
  if forms_kernel(module):
    table = module.adapted_kernel(table)
  kernel = Table(table) if tied else table
  if forms_kernel(module) or not isinstance(module, AdapterLayer):
    return Head(kernel, bias)
  product, scale = module.kind.thin_product(module.leaves()), module.scale[...]
  assert product is not None
  a, b = product
  return Head(kernel, None, b.T, a.T, scale) if tied else Head(kernel, bias, a, b, scale)


def merges(module: AdapterLayer, weights_BT: Array, head: Head) -> bool:
  """Whether the adapter of the head `module` is merged into its kernel."""
  [w] = jax.tree.leaves(head.kernel)
  return matmul.merges(module.compute, weights_BT.size, w, head.a, kept=False)


def merged_kernel(head: Head) -> Array | Table:
  """W + s·A·B, or the table of which it is the transpose."""
  if isinstance(head.kernel, Table):
    return Table(matmul.merge_kernel(head.kernel.embedding, head.b.T, head.a.T, head.scale))
  return matmul.merge_kernel(head.kernel, head.a, head.b, head.scale)


def logits_of(rows: Array, head: Head) -> Array:
  """Returns the logits (M, V) of a head without an adapter, in float32."""
  z = project(rows, head.kernel)
  return z if head.bias is None else z + head.bias


def vocabulary(kernel: Array | Table) -> int:
  """V."""
  return kernel.embedding.shape[0] if isinstance(kernel, Table) else kernel.shape[1]


def project(rows: Array, kernel: Array | Table) -> Array:
  """rows·W (M, V), in float32."""
  w_DV = kernel.embedding.T if isinstance(kernel, Table) else kernel
  return jax.lax.dot(rows, w_DV, preferred_element_type=jnp.float32)


def project_back(dz: Array, kernel: Array | Table) -> Array:
  """dz·Wᵀ (M, D)."""
  return dz @ (kernel.embedding if isinstance(kernel, Table) else kernel.T)


def kernel_gradient(rows: Array, dz: Array, kernel: Array | Table) -> Array | Table:
  """dW = rowsᵀ·dz (D, V), or the gradient of the table, in float32."""
  if isinstance(kernel, Table):
    return Table(jax.lax.dot(dz.T, rows, preferred_element_type=jnp.float32))
  return jax.lax.dot(rows.T, dz, preferred_element_type=jnp.float32)

"""The limit of a step: how long its matrix products take on this machine if nothing else is computed."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_exp.runtime.flops import MatrixProduct
from lora_exp.train.benchmarks.turns import Side

COVERED = 0.95  # share of the FLOPs whose shapes are measured; the others count at the rate of these
SQUARE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}  # of the matrices that show the rate of the device


def largest(products: Mapping[MatrixProduct, int]) -> dict[MatrixProduct, int]:
  """The shapes with the most FLOPs, enough to cover the share COVERED of all FLOPs."""
  total, sums, chosen = sum(p.flops * count for p, count in products.items()), 0, {}
  for product, count in sorted(products.items(), key=_flops_of_item, reverse=True):
    chosen[product] = count
    sums += product.flops * count
    if sums >= COVERED * total:
      break
  return chosen


def _flops_of_item(item: tuple[MatrixProduct, int]) -> int:
  product, count = item
  return product.flops * count


def square(dtype: str) -> MatrixProduct:
  """A product of square matrices that are large enough for the highest rate of the device."""
  size = SQUARE.get(jax.default_backend(), 1024)
  return MatrixProduct(1, size, size, size, (dtype, dtype, dtype), None)


def product_side(product: MatrixProduct, share: float) -> Side:
  """Repeats a plain product of random matrices."""
  left = jax.random.normal(jax.random.key(0), (product.batch, product.m, product.k)).astype(product.dtypes[0])
  right = jax.random.normal(jax.random.key(1), (product.batch, product.k, product.n)).astype(product.dtypes[1])
  repeated = _repeated(product)

  def work(times: int) -> None:
    jax.block_until_ready(repeated(left, right, times))

  return Side(work, share)


def _repeated(product: MatrixProduct) -> Callable[..., jax.Array]:
  """(left, right, times) -> the last of `times` products, in a loop on the device so that no call is waited for."""

  def multiply(left: jax.Array, right: jax.Array) -> jax.Array:
    dimensions = (((2,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dimensions, product.precision, jnp.dtype(product.dtypes[2]))

  def body(i: jax.Array, arrays: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    left, right, _ = arrays
    left = left.at[0, 0, 0].set(i.astype(left.dtype))  # otherwise XLA takes the product out of the loop
    return left, right, multiply(left, right)

  def run(left: jax.Array, right: jax.Array, times: Any) -> jax.Array:
    out = jnp.zeros((product.batch, product.m, product.n), product.dtypes[2])
    return jax.lax.fori_loop(0, times, body, (left, right, out))[2]

  return jax.jit(run)


def limit_seconds(
  products: Counter[MatrixProduct], needed_flops: int, measured: Mapping[MatrixProduct, float]
) -> float:
  """Seconds of `needed_flops` at the rate of the `measured` shapes, each as often as the step computes it.

  `measured`: seconds of one product of a shape.
  """
  flops = sum(products[product] * product.flops for product in measured)
  seconds = sum(products[product] * taken for product, taken in measured.items())
  return needed_flops * seconds / flops

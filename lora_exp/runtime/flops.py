"""Counts the floating-point operations of a program from its jaxpr, so that no model needs a formula."""

import math
from collections import Counter
from typing import Any, NamedTuple

from jax.interpreters import partial_eval


class MatrixProduct(NamedTuple):
  """The shape of a batched matrix product (batch, M, K) × (batch, K, N) in a program, and its dtypes."""

  batch: int
  m: int
  k: int
  n: int
  dtypes: tuple[str, str, str]  # of both arguments and of the result
  precision: Any  # as of jax.lax.dot_general

  @property
  def flops(self) -> int:
    """Two for each multiply-add."""
    return 2 * self.batch * self.m * self.k * self.n


def count_flops(jaxpr: Any) -> int:
  """FLOPs of all matrix products that the outputs of `jaxpr` depend on (2 per multiply-add); scans count every step."""
  return sum(count * product.flops for product, count in matrix_products(jaxpr).items())


def matrix_products(jaxpr: Any) -> Counter[MatrixProduct]:
  """How often the outputs of `jaxpr` need each shape of a matrix product; scans count every step."""
  return _products(partial_eval.dce_jaxpr(jaxpr, True)[0])


def _products(jaxpr: Any) -> Counter[MatrixProduct]:
  products: Counter[MatrixProduct] = Counter()
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      products[_product_of(eqn)] += 1
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    for v in inner:
      for product, count in _products(getattr(v, "jaxpr", v)).items():
        products[product] += times * count
  return products


def _product_of(eqn: Any) -> MatrixProduct:
  """The shape of a `dot_general`."""
  (contract, _), (batched, _) = eqn.params["dimension_numbers"]
  left, right, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
  batch = math.prod(left.shape[i] for i in batched)
  k = math.prod(left.shape[i] for i in contract)
  m = left.size // max(batch * k, 1)
  n = right.size // max(batch * k, 1)
  dtypes = (str(left.dtype), str(right.dtype), str(out.dtype))
  return MatrixProduct(batch, m, k, n, dtypes, eqn.params["precision"])

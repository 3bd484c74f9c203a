"""Counts the floating-point operations of a program from its jaxpr, so that no model needs a formula."""

import math
from typing import Any

from jax.interpreters import partial_eval


def count_flops(jaxpr: Any) -> int:
  """FLOPs of all matrix products that the outputs of `jaxpr` depend on (2 per multiply-add); scans count every step."""
  return _count(partial_eval.dce_jaxpr(jaxpr, True)[0])


def _count(jaxpr: Any) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contract)
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    inner = [v for v in eqn.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
    total += times * sum(_count(getattr(v, "jaxpr", v)) for v in inner)
  return total

"""Boundaries for XLA's fusion: results that must have the same bits whatever computation surrounds them.

XLA fuses an addition into the norm that follows it, and LLVM then computes that norm's sum in another order. An adapter
whose update is exactly zero would change the last bit of the logits, and a trial's gradient in a pack would differ from
that of its solo run (by 1e-4 after 30 layers). On CPU, XLA removes `optimization_barrier` before it fuses, but a call
that must not be inlined is kept.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def apart(x: jax.Array) -> jax.Array:
  """`x`, not fused with the operations that use it."""
  if jax.default_backend() != "cpu":
    return jax.lax.optimization_barrier(x)
  with set_xla_metadata(inlineable="false"):
    return _same(x)


def compiled_alone(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, compiled on CPU as a computation of its own, so that its bits do not depend on a loop over trials."""
  if jax.default_backend() != "cpu":
    return function

  def called(*args: Any) -> Any:
    with set_xla_metadata(inlineable=None):  # functions that it calls may be inlined
      return function(*args)

  def call(*args: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
      return jax.jit(called)(*args)

  return call


_same = jax.jit(jax.lax.optimization_barrier)  # tracing would remove a plain identity

"""Barriers against XLA fusion, for results whose bits must not depend on the surrounding computation.

XLA fuses an addition into the norm after it, and LLVM then sums the norm in another order. An adapter with an update of
exactly zero would change the last bit of the logits, and a trial's gradient in a pack would differ from that of its
solo run (by 1e-4 after 30 layers). On CPU, XLA removes `optimization_barrier` before fusion, but not a call that must
not be inlined.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def apart(x: jax.Array) -> jax.Array:
  """Returns `x`, which XLA does not fuse with the operations that use it."""
  if jax.default_backend() != "cpu":
    return jax.lax.optimization_barrier(x)
  with set_xla_metadata(inlineable="false"):
    return _same(x)


def compiled_alone(function: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles `function` as a separate computation on CPU, so that its bits do not depend on a loop over trials."""
  if jax.default_backend() != "cpu":
    return function

  def called(*args: Any) -> Any:
    with set_xla_metadata(inlineable=None):  # the functions that it calls may be inlined
      return function(*args)

  def call(*args: Any) -> Any:
    with set_xla_metadata(inlineable="false"):
      return jax.jit(called)(*args)

  return call


_same = jax.jit(jax.lax.optimization_barrier)  # tracing would remove a plain identity

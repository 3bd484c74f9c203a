"""Boundaries for the compiler: what must come out in the same bits whatever stands around it.

XLA fuses an addition into the norm that follows it, and LLVM then adds that norm's sum in another order: an adapter
whose update is exactly zero would move the last bit of the logits, and a trial's gradient in a pack would not be that of
its solo run (30 layers make 1e-4 of it). On a CPU XLA drops `optimization_barrier` before it fuses; a call that may not
be inlined is kept.
"""

from collections.abc import Callable

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def apart(x: jax.Array) -> jax.Array:
  """`x`, not fused with what uses it."""
  if jax.default_backend() != "cpu":
    return jax.lax.optimization_barrier(x)
  with set_xla_metadata(inlineable="false"):
    return _same(x)


def compiled_alone(function: Callable) -> Callable:
  """`function`, on a CPU compiled as a computation of its own: the same bits in a loop over trials as without one."""
  if jax.default_backend() != "cpu":
    return function

  def called(*args):
    with set_xla_metadata(inlineable=None):  # what it calls may be inlined
      return function(*args)

  def call(*args):
    with set_xla_metadata(inlineable="false"):
      return jax.jit(called)(*args)

  return call


_same = jax.jit(jax.lax.optimization_barrier)  # a plain identity would be traced away

"""A boundary for the compiler: what must come out in the same bits whatever produced it.

XLA fuses an addition into the norm that follows it, and LLVM then adds that norm's sum in another order: an adapter
whose update is exactly zero would move the last bit of the logits. On a CPU XLA drops `optimization_barrier` before it
fuses; a call that may not be inlined is kept.
"""

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def apart(x: jax.Array) -> jax.Array:
  """`x`, not fused with what uses it."""
  if jax.default_backend() != "cpu":
    return jax.lax.optimization_barrier(x)
  with set_xla_metadata(inlineable="false"):
    return _same(x)


_same = jax.jit(jax.lax.optimization_barrier)  # a plain identity would be traced away

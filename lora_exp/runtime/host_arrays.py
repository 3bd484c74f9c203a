"""Transfers between the host and the devices of several processes.

With one process, these functions are `jax.device_put` and `jax.device_get`.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def put_equal(tree: Any, sharding: NamedSharding) -> Any:
  """Puts host arrays, which all processes have in full, on the devices.

  Each process transfers only what its own devices hold.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def put(x: Any) -> jax.Array:
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      data = put(jax.random.key_data(x))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

  return jax.tree.map(put, tree)


def on_host(tree: Any) -> Any:
  """The arrays of `tree` as numpy arrays on every process. All processes must call it."""
  if jax.process_count() == 1:
    return jax.device_get(tree)
  return jax.tree.map(_whole, tree)


def _whole(x: Any) -> np.ndarray:
  if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))

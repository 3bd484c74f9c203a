"""Sums over the segments of rows: the parts of documents that sequence packing puts into one row."""

import jax
import jax.numpy as jnp
import numpy as np


def segment_sums(x: jax.Array | np.ndarray, segments_BT: jax.Array | np.ndarray | None, count: int):
  """The sums of `x` over each of the first `count` (S) segments of every row, (B, S).

  `x`: values of tokens (B, T), or of rows (B,), which belong to the first segment. `segments_BT`: the segment of each
  token, from 1 on; 0 for padding. Without it, `x` holds values of examples (B,).
  """
  numpy = jnp if isinstance(x, jax.Array) else np
  if x.ndim == 1:
    return numpy.pad(x[:, None], ((0, 0), (0, count - 1)))
  assert segments_BT is not None
  numbers = numpy.arange(1, count + 1)
  return numpy.where(segments_BT[:, :, None] == numbers, x[:, :, None], 0).sum(1)

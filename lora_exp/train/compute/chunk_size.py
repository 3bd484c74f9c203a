"""The number of logits that the loss holds at once. No jax."""

CHUNK_LOGITS = 2**25  # most logits in a chunk: 128 MiB in float32; with half as many a step takes 7 % longer


def chunk_positions(rows: int, length: int, vocab_size: int, most: int = CHUNK_LOGITS) -> int:
  """The positions of a row in a chunk: a power of two, so that common lengths need no padding, or all of them.

  `most` is the largest number of logits.
  """
  size = max(1, most // (vocab_size * rows))
  return min(length, 2 ** (size.bit_length() - 1))

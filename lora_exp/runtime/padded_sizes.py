"""Sizes to which arrays are padded, so that few programs are compiled. No jax."""


def power_of_two(n: int) -> int:
  """The smallest power of two that is at least `n`."""
  return 1 << max(0, n - 1).bit_length()

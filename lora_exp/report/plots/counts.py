"""Counts as short text."""


def short_count(value: float) -> str:
  """A count with three significant digits: 950, 12.3k, 1.5M."""
  for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
    if value >= size:
      return f"{value / size:.3g}{letter}"
  return f"{value:.0f}"

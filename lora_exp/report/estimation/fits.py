"""A parabola fitted around the lowest of several points."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Parabola:
  """y = curvature · (x − vertex)² + minimum."""

  curvature: float  # positive
  vertex: float
  minimum: float

  def at(self, x: np.ndarray) -> np.ndarray:
    return self.curvature * (x - self.vertex) ** 2 + self.minimum


def fit_parabola(x: Sequence[float], y: Sequence[float]) -> Parabola | None:
  """The parabola through the lowest point and its two neighbours; None if the lowest point is the first or last.

  More points would not help: far from its minimum a curve is no parabola, and a learning rate that nearly diverges
  would bend the fit.
  """
  order = np.argsort(x)
  xs, ys = np.asarray(x, dtype=float)[order], np.asarray(y, dtype=float)[order]
  if len(xs) < 3:
    return None
  lowest = int(np.argmin(ys))
  if lowest in (0, len(xs) - 1):
    return None
  near = slice(lowest - 1, lowest + 2)
  a, b, c = np.polyfit(xs[near], ys[near], 2)
  if a <= 0:
    return None
  return Parabola(float(a), float(-b / (2 * a)), float(c - b * b / (4 * a)))

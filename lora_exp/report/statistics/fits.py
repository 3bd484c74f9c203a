"""The Pareto front of (cost, penalty) points, and the minimum of a fitted parabola."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def front(points: Sequence[tuple[float, float]]) -> list[int]:
  """Places of the (cost, penalty) that no other point beats in both, by cost."""
  order = sorted(range(len(points)), key=lambda i: points[i])
  found: list[int] = []
  for i in order:
    if not found or points[i][1] < points[found[-1]][1]:
      found.append(i)
  return found


@dataclass(frozen=True)
class Parabola:
  """y = a·(x − place)² + least, fitted by least squares."""

  a: float
  place: float
  least: float

  def at(self, x: np.ndarray) -> np.ndarray:
    return self.a * (x - self.place) ** 2 + self.least


def parabola(x: Sequence[float], y: Sequence[float]) -> Parabola | None:
  """The parabola with a minimum through the best point and its two neighbours on each side; None if there is none.

  Far from the minimum the curve is no parabola, and a rate that nearly diverges would bend the fit.
  """
  order = np.argsort(x)
  xs, ys = np.asarray(x, dtype=float)[order], np.asarray(y, dtype=float)[order]
  if len(xs) < 3:
    return None
  best = int(np.argmin(ys))
  low = max(0, min(best - 1, len(xs) - 3)) if len(xs) < 5 else max(0, min(best - 2, len(xs) - 5))
  near = slice(low, low + (3 if len(xs) < 5 else 5))
  a, b, c = np.polyfit(xs[near], ys[near], 2)
  if a <= 0:
    return None
  place = -b / (2 * a)
  return Parabola(float(a), float(place), float(c - b * b / (4 * a)))

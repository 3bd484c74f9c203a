"""Measurement in turns: the sides that are compared take turns, so that other work slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_REPEATS = 10_000  # calls in a turn
WARM_UPS = 2  # units of work before the first turn


@dataclass(frozen=True)
class Spread:
  """A measured value: the median over turns, and the quartiles."""

  median: float
  low: float
  high: float


def spread(values: list[float]) -> Spread:
  """The median and the quartiles of the turns; for a single turn, its value."""
  if len(values) == 1:
    return Spread(values[0], values[0], values[0])
  low, median, high = statistics.quantiles(values, n=4, method="inclusive")
  return Spread(median, low, high)


def ratios(values: list[float], others: list[float]) -> Spread:
  """The spread of `values` / `others`, turn by turn."""
  return spread([value / other for value, other in zip(values, others, strict=True)])


@dataclass(frozen=True)
class Side:
  """Work that is measured. `work(n)` does it n times and returns when all of it is finished."""

  work: Callable[[int], Any]
  share: float = 1.0  # of the seconds of a turn


def take_turns(
  sides: Mapping[str, Side], turns: int, seconds: float
) -> dict[str, list[float]]:
  """Seconds of one unit of each side's work, one value for each turn.

  In a turn, each side works for about `seconds` times its share. Before the first turn, each side works twice: once to
  compile, and once to find how often its work must be repeated.
  """
  repeats = {}
  for name, side in sides.items():
    side.work(1)
    once = _seconds(side, 1)
    repeats[name] = max(1, min(MOST_REPEATS, round(seconds * side.share / max(once, 1e-9))))
  measured: dict[str, list[float]] = {name: [] for name in sides}
  for _ in range(turns):
    for name, side in sides.items():
      measured[name].append(_seconds(side, repeats[name]))
  return measured


class FirstCalls:
  """Seconds from the beginning of each unit of work to the first call of `called`."""

  def __init__(self) -> None:
    self.seconds: list[float] = []
    self.began: float | None = None

  def begin(self) -> None:
    """Begins a unit of work."""
    self.began = time.perf_counter()

  def called(self, *_: object) -> None:
    """Notes the time of the first call."""
    if self.began is not None:
      self.seconds.append(time.perf_counter() - self.began)
      self.began = None


def _seconds(side: Side, repeats: int) -> float:
  """Seconds of one unit of work."""
  began = time.perf_counter()
  side.work(repeats)
  return (time.perf_counter() - began) / repeats

"""Means and differences over seeds with 95 % intervals of Student's t."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Student's t, 0.975 quantile, by degrees of freedom; between the last ones linear in 1/df.
T_975 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060, 9: 2.2622,
         10: 2.2281, 12: 2.1788, 15: 2.1314, 20: 2.0860, 30: 2.0423, 60: 2.0003, 120: 1.9799}
NORMAL_975 = 1.9600


@dataclass(frozen=True)
class Estimate:
  """A mean over `n` seeds and the half width of its 95 % interval, which is None with fewer than two seeds."""

  mean: float  # NaN without a value
  half: float | None
  n: int

  @property
  def low(self) -> float:
    return self.mean - (self.half or 0.0)

  @property
  def high(self) -> float:
    return self.mean + (self.half or 0.0)

  def text(self, digits: int = 4, sign: bool = False, factor: float = 1.0) -> str:
    """As `1.2345 ± 0.0067`, both times `factor`; a dash without a value. At least `digits` decimals."""
    if not self.n:
      return "-"
    half = None if self.half is None else self.half * factor
    if half is not None and half > 1e-9:  # two significant digits of the interval
      digits = max(digits, min(7, 1 - math.floor(math.log10(half))))
    mean = f"{self.mean * factor:{'+' if sign else ''}.{digits}f}"
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


@dataclass(frozen=True)
class Difference(Estimate):
  """The mean of a − b: over the seeds that both have (`paired`), or of their means (Welch)."""

  paired: bool = True


def t_quantile(df: float) -> float:
  """The 0.975 quantile of Student's t; `df` may be a fraction."""
  if df < 1:
    return math.inf
  inverse = [0.0, *(1 / d for d in reversed(T_975))]
  return float(np.interp(1 / df, inverse, [NORMAL_975, *reversed(T_975.values())]))


def estimate(values: Sequence[float]) -> Estimate:
  """Mean and 95 % interval: t(n − 1) · s / √n."""
  n = len(values)
  if n < 2:
    return Estimate(values[0] if n else math.nan, None, n)
  x = np.asarray(values, dtype=float)
  return Estimate(float(x.mean()), float(t_quantile(n - 1) * x.std(ddof=1) / math.sqrt(n)), n)


def difference(a: Mapping[tuple, float], b: Mapping[tuple, float]) -> Difference:
  """a − b, both by seeds: paired if they share at least two seeds, otherwise Welch's interval of two means."""
  shared = [seeds for seeds in a if seeds in b]
  if len(shared) >= 2:
    paired = estimate([a[seeds] - b[seeds] for seeds in shared])
    return Difference(paired.mean, paired.half, paired.n, True)
  x, y = np.array(list(a.values()), dtype=float), np.array(list(b.values()), dtype=float)
  n = min(len(x), len(y))
  mean = float(x.mean() - y.mean()) if n else math.nan
  if n < 2:
    return Difference(mean, None, n, False)
  u, v = x.var(ddof=1) / len(x), y.var(ddof=1) / len(y)
  if u + v == 0:
    return Difference(mean, 0.0, n, False)
  df = float((u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)))  # Welch–Satterthwaite
  return Difference(mean, t_quantile(df) * math.sqrt(u + v), n, False)

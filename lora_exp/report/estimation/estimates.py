"""Means and ratios over seeds with 95 % intervals of Student's t."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

MOST_DF = 1e6  # beyond which Student's t is the normal distribution


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

  @property
  def t(self) -> float:
    """Student's quantile of the interval."""
    return t_quantile(self.n - 1)

  def text(self, digits: int = 4, sign: bool = False, factor: float = 1.0) -> str:
    """Such as `1.2345 ± 0.0067`, multiplied by `factor`; a dash if there is no value. At least `digits` decimals."""
    if not self.n:
      return "-"
    half = None if self.half is None else self.half * factor
    if half is not None and half > 1e-9:  # two significant digits of the interval
      digits = max(digits, min(7, 1 - math.floor(math.log10(half))))
    mean = f"{self.mean * factor:{'+' if sign else ''}.{digits}f}"
    return mean if half is None else f"{mean} ± {half:.{digits}f}"


def t_quantile(df: float) -> float:
  """The 0.975 quantile of Student's t; `df` may be a fraction."""
  return math.inf if df < 1 else float(stdtrit(df, 0.975))


def estimate(values: Sequence[float]) -> Estimate:
  """Mean and 95 % interval: t(n − 1) · s / √n."""
  n = len(values)
  if n < 2:
    return Estimate(values[0] if n else math.nan, None, n)
  x = np.asarray(values, dtype=float)
  return Estimate(float(x.mean()), float(t_quantile(n - 1) * x.std(ddof=1) / math.sqrt(n)), n)


@dataclass(frozen=True)
class Ratio:
  """A ratio of two means with its 95 % interval; the interval is infinite where the lower mean may be 0."""

  mean: float
  low: float
  high: float
  n: int  # seeds of the one that has fewer

  @property
  def half(self) -> float | None:
    """The larger half width; None where there is no bounded interval."""
    half = max(self.high - self.mean, self.mean - self.low)
    return half if math.isfinite(half) else None


def ratio(a: Mapping[tuple, float], b: Mapping[tuple, float], added: np.ndarray | None = None) -> Ratio | None:
  """mean(a) / mean(b) with Fieller's interval: by seed if they share at least two seeds, otherwise of two samples.

  `added`: the covariance (2, 2) of further errors of the two means that are independent of seeds, taken as exact. The
  degrees of freedom are Satterthwaite's. None unless mean(b) > 0.
  Fieller (1954), Some problems in interval estimation: the values r for which a − r · b does not differ from 0.
  """
  known = np.zeros((2, 2)) if added is None else added
  shared = [seed for seed in a if seed in b]
  if len(shared) >= 2:
    x, y = (np.array([values[seed] for seed in shared], dtype=float) for values in (a, b))
  else:
    x, y = (np.array(list(values.values()), dtype=float) for values in (a, b))
  n = min(len(x), len(y))
  if not n or not (np.isfinite(x).all() and np.isfinite(y).all()) or y.mean() <= 0:
    return None
  mean = float(x.mean() / y.mean())
  if n < 2:
    return Ratio(mean, -math.inf, math.inf, n)
  if len(shared) >= 2:
    (u, c), (_, v) = np.cov(x, y) / n
    df = n - 1.0
  else:
    u, c, v = x.var(ddof=1) / len(x), 0.0, y.var(ddof=1) / len(y)
    w = u + mean**2 * v
    df = w**2 / (u**2 / (len(x) - 1) + (mean**2 * v) ** 2 / (len(y) - 1)) if w > 0 else n - 1.0
  by_seeds = u - 2 * mean * c + mean**2 * v
  u, c, v = u + known[0, 0], c + known[0, 1], v + known[1, 1]
  if by_seeds > 0:
    df *= ((u - 2 * mean * c + mean**2 * v) / by_seeds) ** 2
  t = t_quantile(min(df, MOST_DF))
  # (x − r y)² ≤ t² (u − 2 r c + r² v)
  p, q, r = y.mean() ** 2 - t**2 * v, x.mean() * y.mean() - t**2 * c, x.mean() ** 2 - t**2 * u
  if p <= 0:
    return Ratio(mean, -math.inf, math.inf, n)
  root = math.sqrt(max(float(q**2 - p * r), 0.0))
  return Ratio(mean, float((q - root) / p), float((q + root) / p), n)

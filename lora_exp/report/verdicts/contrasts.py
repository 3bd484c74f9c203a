"""Contrasts g_i − (1 − m) · g_j of the gains of settings, and tests of them, from numbers alone.

Gains are modelled as setting + seed + error and fitted by least squares, which for a complete design takes the seeds'
common effect out of every difference. The variance of the error is pooled over settings. Because a setting may scatter
more than the others, each test must also hold with the spread of its own two settings, at RELAXED times the level. With
more seeds this second test is relaxed less, because the spread of two settings is then known better. If an F test finds
that the two scatter more or less than the rest, only their own spread is used. The constants are measured by
tests/bench/verdicts.py.

Reference: Holm (1979), A simple sequentially rejective multiple test procedure.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import fdtr, fdtrc, stdtr, stdtrit

SEEDS_NEEDED = 3
CLOSE = 0.45  # standard error of a difference, as a share of the margin, above which the level falls
RELAXED = 3.4  # factor of the level of the second test, with three seeds
RELAXED_LESS = 0.5  # decrease of this factor with each further seed
SCATTERS_MORE, SCATTERS_LESS = 0.025, 0.005  # p-values of the F test below which the spread of a pair is not pooled
POWER_FACTOR = 22.0  # 2 · (z_0.95 + z_0.95)²: seeds to show a difference δ with error s are about 22 · (s / δ)²
MOST_SEEDS = 1000
MOST_SHORT = 16.0  # times the best gain; nothing is known beyond

Terms = tuple[float, float, float]  # variance of x_i, covariance, variance of x_j


class Contrasts:
  """Least squares of gain = setting + seed + error, and tests of g_i − (1 − m) · g_j, for settings by index."""

  def __init__(self, gains: Sequence[Mapping[Any, float]], added: np.ndarray | None = None):
    self.gains = gains
    self.count = len(gains)
    self.added = np.zeros((self.count, self.count)) if added is None else np.asarray(added, dtype=float)
    seeds = list(dict.fromkeys(seed for by_seed in gains for seed in by_seed))
    cells = [(i, seeds.index(seed), g) for i, by_seed in enumerate(gains) for seed, g in by_seed.items()]
    self._fit(cells, len(seeds))

  def _fit(self, cells: Sequence[tuple[int, int, float]], n_seeds: int) -> None:
    """`means` at the average seed, their covariance `unit` in units of the error variance, residuals, `df`."""
    y = np.array([g for _, _, g in cells])
    settings = np.zeros((len(cells), self.count))
    seeds = np.zeros((len(cells), max(n_seeds - 1, 0)))  # effects that sum to zero over seeds
    for row, (i, k, _) in enumerate(cells):
      settings[row, i] = 1
      if k < n_seeds - 1:
        seeds[row, k] = 1
      else:
        seeds[row] = -1
    design = np.hstack([settings, seeds])
    self.seeds_removed = np.linalg.matrix_rank(design) == design.shape[1] < len(cells)
    if not self.seeds_removed:
      design = settings
    inverse = np.linalg.pinv(design.T @ design)
    effects = inverse @ design.T @ y
    residuals = y - design @ effects
    self.means = effects[: self.count]
    self.unit = inverse[: self.count, : self.count]
    self.df = len(cells) - design.shape[1]
    self.variance = float(residuals @ residuals / self.df) if self.df > 0 else math.nan
    scale = float(np.abs(y).max(initial=0.0))
    self.variance = max(self.variance, (1e-9 * scale) ** 2)  # identical numbers: rounding, not certainty
    setting_of_cell = np.array([setting for setting, _, _ in cells], dtype=int)
    self.squares = np.array([float((residuals[setting_of_cell == n] ** 2).sum()) for n in range(self.count)])
    # The seed effects take an equal share of each setting's degrees of freedom.
    self.dfs = self.df * np.array([len(by_seed) for by_seed in self.gains]) / max(len(cells), 1)
    seed_effects = effects[self.count :]
    every = np.append(seed_effects, -seed_effects.sum()) if self.seeds_removed and n_seeds > 1 else np.zeros(1)
    self.seed_variance = float((every**2).sum() / max(len(every) - 1, 1) / len(every))  # of the mean over seeds

  @cached_property
  def _apart(self) -> np.ndarray:
    """(S, S): whether the residuals of two settings are larger or smaller than those of the rest, by an F test."""
    pair, pair_df = self.squares[:, None] + self.squares, self.dfs[:, None] + self.dfs
    rest, rest_df = self.squares.sum() - pair, self.df - pair_df
    if self.count < 3 or self.df < 1 or self.variance == 0 or pair_df.min() <= 0.5 or rest_df.min() <= 0.5:
      return np.zeros((self.count, self.count), dtype=bool)
    ratio = pair / pair_df / np.maximum(rest / rest_df, 1e-6 * self.variance)
    return (fdtrc(pair_df, rest_df, ratio) < SCATTERS_MORE) | (fdtr(pair_df, rest_df, ratio) < SCATTERS_LESS)

  @property
  def pooled(self) -> bool:
    """Whether one variance serves all pairs."""
    return not self._apart[~np.eye(self.count, dtype=bool)].any()

  @property
  def error(self) -> float:
    """Standard deviation of a trial after removing settings and seeds."""
    return math.sqrt(self.variance) if self.df > 0 else math.nan

  def any_gain(self, level: float, eligible: set[int]) -> bool:
    """Whether a setting's mean gain is shown to be above 0, by the spread of its own seeds."""
    for i in eligible:
      g = np.array(list(self.gains[i].values()))
      error = math.sqrt(float(g.var(ddof=1)) / len(g) + self.added[i, i])
      if g.mean() > stdtrit(len(g) - 1, 1 - level) * error:
        return True
    return False

  def estimate(self, i: int, j: int, margin: float) -> float:
    """g_i − (1 − margin) · g_j."""
    return float(self.means[i] - (1 - margin) * self.means[j])

  def p_pooled(self, i: int, j: int) -> float:
    """One-sided p of g_i > g_j by the pooled variance."""
    return _p(self.estimate(i, j, 0.0), self.variance * _quadratic(self._unit[i][j], 1.0), self.df, 0.0)

  def p_value(self, i: int, j: int, margin: float, sign: int = 1) -> float:
    """One-sided p of sign · (g_i − (1 − margin) · g_j) > 0: the larger of the pooled and the relaxed own test."""
    value, weight = sign * self.estimate(i, j, margin), 1 - margin
    extra = _quadratic(self._added[i][j], weight)
    own_terms, own_df = self._own[i, j]
    own = _p(value, _quadratic(own_terms, weight), own_df, extra)
    if self._apart[i, j]:
      return own
    if self.df < 1:
      return 1.0
    n = min(len(self.gains[i]), len(self.gains[j]))
    relaxed = max(1.0, RELAXED - RELAXED_LESS * (n - SEEDS_NEEDED))
    by_seeds = self.variance * _quadratic(self._unit[i][j], weight) + margin**2 * self.seed_variance
    return max(_p(value, by_seeds, self.df, extra), own / relaxed)

  @cached_property
  def _unit(self) -> list[list[Terms]]:
    return _all_terms(self.unit)

  @cached_property
  def _added(self) -> list[list[Terms]]:
    return _all_terms(self.added)

  @cached_property
  def _own(self) -> dict[tuple[int, int], tuple[Terms, float]]:
    """(i, j) -> variances and covariance of the two means by their own spread alone, and degrees of freedom."""
    pairs = [(i, j) for i in range(self.count) for j in range(self.count) if i != j]
    seeds = list(self.gains[0]) if self.gains else []
    if len(seeds) >= SEEDS_NEEDED and all(by_seed.keys() == self.gains[0].keys() for by_seed in self.gains):
      terms = _all_terms(np.cov([[by_seed[seed] for seed in seeds] for by_seed in self.gains]) / len(seeds))
      return {(i, j): (terms[i][j], len(seeds) - 1) for i, j in pairs}
    return {(i, j): _own_terms(self.gains[i], self.gains[j]) for i, j in pairs}

  def sufficient(self, i: int, margin: float, level: float) -> bool:
    """Whether every test of i against another setting holds."""
    return all(self.p_value(i, j, margin) < self._level(i, j, margin, level) for j in range(self.count) if j != i)

  def open_against(self, i: int, margin: float, level: float) -> list[int]:
    """The settings compared with which i is not shown to be less than the margin worse."""
    return [j for j in range(self.count) if j != i and self.p_value(i, j, margin) >= self._level(i, j, margin, level)]

  def _level(self, i: int, j: int, margin: float, level: float) -> float:
    """`level`, or less where the standard error is more than CLOSE of the margin; at least half of it."""
    reach = margin * float(self.means.max())
    if self.df < 1 or reach <= 0:
      return level / 2
    pooled = self.variance * _quadratic(self._unit[i][j], 1 - margin)
    spread = float(self.squares[[i, j]].sum() / self.dfs[[i, j]].sum()) / self.variance
    error = math.sqrt(pooled * max(1.0, (1 + spread) / 2))
    return level * min(1.0, max(0.5, (CLOSE * reach / error) ** 2)) if error > 0 else level

  def insufficient(self, margin: float, level: float, eligible: set[int]) -> dict[int, list[int]]:
    """i -> the settings compared with which it is shown to be more than the margin worse: Holm over ordered pairs."""
    pairs = [(self.p_value(i, j, margin, -1), i, j) for i in eligible for j in eligible if i != j]
    shown: dict[int, list[int]] = {}
    for rank, (p, i, j) in enumerate(sorted(pairs)):
      if p > level / (len(pairs) - rank):
        break
      shown.setdefault(i, []).append(j)
    return shown

  def at_most(self, i: int, level: float) -> float:
    """The smallest margin at which i would be sufficient: an upper bound of how far it is short of the best."""
    low, high = 0.0, 1.0
    while not self.sufficient(i, high, level):
      low, high = high, 4 * high
      if high > MOST_SHORT:
        return math.inf
    for _ in range(16):
      middle = (low + high) / 2
      low, high = (low, middle) if self.sufficient(i, middle, level) else (middle, high)
    return high

  def more_seeds(self, i: int, margin: float) -> int | None:
    """Further seeds of each setting that would probably bring i across the margin or away from it."""
    if not self.error > 0:
      return None
    closest = min((self.estimate(i, j, margin) for j in range(self.count) if j != i), default=0.0)
    delta = max(abs(closest), margin * float(self.means.max()) / 2)
    have = min(len(by_seed) for by_seed in self.gains)
    if POWER_FACTOR * self.variance >= (have + MOST_SEEDS) * delta**2:
      return MOST_SEEDS
    return max(math.ceil(POWER_FACTOR * self.variance / delta**2) - have, 1)


def _own_terms(a: Mapping[Any, float], b: Mapping[Any, float]) -> tuple[Terms, float]:
  """By seed where the two share enough of them; otherwise Welch's, with the smaller degrees of freedom."""
  shared = [seed for seed in a if seed in b]
  if len(shared) >= SEEDS_NEEDED:
    x, y = ([values[seed] for seed in shared] for values in (a, b))
    return (_covariance(x, x), _covariance(x, y), _covariance(y, y)), len(shared) - 1
  if min(len(a), len(b)) < 2:
    return (math.inf, 0.0, math.inf), 1
  u, v = (_covariance(list(values.values()), list(values.values())) for values in (a, b))
  return (u, 0.0, v), min(len(a), len(b)) - 1


def _covariance(x: Sequence[float], y: Sequence[float]) -> float:
  """The covariance of two means by n paired numbers."""
  n = len(x)
  mean_x, mean_y = math.fsum(x) / n, math.fsum(y) / n
  return math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / (n - 1) / n


def _all_terms(covariance: np.ndarray) -> list[list[Terms]]:
  c, indices = covariance.tolist(), range(len(covariance))
  return [[(c[i][i], c[i][j], c[j][j]) for j in indices] for i in indices]


def _quadratic(terms: Terms, weight: float) -> float:
  """The variance of x_i − weight · x_j."""
  u, c, v = terms
  return max(u - 2 * weight * c + weight**2 * v, 0.0)


def _p(value: float, by_seeds: float, df: float, extra: float) -> float:
  """One-sided p of `value` > 0. `by_seeds`: its variance, known with `df`; `extra`: a variance that is known well.

  The degrees of freedom of the sum are Satterthwaite's.
  """
  total = by_seeds + extra
  if total == 0:
    return 0.0 if value > 0 else 1.0
  if by_seeds > 0:
    df *= (total / by_seeds) ** 2
  return float(stdtr(min(df, 1e6), -value / math.sqrt(total)))

"""Which of several settings are enough: the test behind every verdict of the report. It knows no files and no runs.

Settings are given by their gains over the base, one for each seed (higher is better; NaN for a seed that diverged).
The margin m is a share of the best setting's gain, fixed beforehand. A setting with mean gain g_i is

    sufficient     if it is shown for every other setting j that g_i > (1 − m) · g_j: intersection-union of one-sided
                   tests, each at `level`. It is then less than the margin worse than the best, whichever that is.
    insufficient   if it is shown for one j that g_i < (1 − m) · g_j: Holm's correction over all ordered pairs, at half
                   of `level`, because a sweep that claims both kinds has both chances to be wrong.
    undecided      otherwise.

Where the noise is as large as the margin, only the setting that came out best can be sufficient, and each of them has
the chance to: there the tests of sufficiency are at half of `level` too.

The contrast g_i − (1 − m) · g_j is tested as it stands, so that the error of the margin itself is in the test.

Gains are modelled as setting + seed + error and fitted by least squares, which for a complete design takes the seeds'
common effect out of every difference. The variance of the error is pooled over settings. Because a setting may scatter
more than the others, each test must also hold with the spread of its own two settings at RELAXED times the level, and
at the level itself where Bartlett's test finds that the spreads differ. The more seeds, the less the second test is
relaxed: with three seeds a spread of two settings alone (two degrees of freedom) says little.

References: Berger (1982), Multiparameter hypothesis testing and acceptance sampling (intersection-union);
Holm (1979), A simple sequentially rejective multiple test procedure.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import chdtrc, stdtr, stdtrit

from lora_exp.config.schema import ReportConfig

SUFFICIENT, INSUFFICIENT, UNDECIDED = "sufficient", "insufficient", "undecided"
SEEDS_NEEDED = 3
MARGIN = ReportConfig.margin  # default share of the best setting's gain
LEVEL = 0.05
NOISY = 0.75  # standard error of a difference, as a share of the margin, above which the level is halved
RELAXED = 3.4  # times the level, with three seeds; 1 with thirteen or more
SPREADS_DIFFER = 0.02  # p of Bartlett's test below which the variance is not pooled
POWER_FACTOR = 22.0  # 2 · (z_0.95 + z_0.95)²: seeds to show a difference δ with error s are about 22 · (s / δ)²
MOST_SEEDS = 1000
MOST_SHORT = 16.0  # times the best gain; nothing is known beyond

Terms = tuple[float, float, float]  # variance of x_i, covariance, variance of x_j
Gains = Mapping[str, Mapping[Any, float]]  # setting -> seed -> gain over the base; NaN where it diverged


@dataclass(frozen=True)
class SettingVerdict:
  """The verdict on one setting."""

  name: str
  state: str  # sufficient | insufficient | undecided
  seeds: int  # that count, diverged ones included
  diverged: int
  gain: float  # mean, adjusted for the seeds that it shares with the others; NaN if every seed diverged
  short: float  # of the best setting's gain, as a share of it; 0 for the best
  at_most: float  # upper bound of `short` at `level`: below the margin if sufficient; inf if nothing is known
  worse_than: tuple[str, ...]  # settings than which it is shown to be more than the margin worse
  more_seeds: int | None  # further seeds of each setting that would probably decide; None if decided or not known
  open_against: tuple[str, ...] = ()  # settings than which it is not shown to be less than the margin worse


@dataclass(frozen=True)
class Judgement:
  """The verdicts on all settings of one comparison."""

  verdicts: dict[str, SettingVerdict]  # in the order given
  best: str | None  # with the highest mean gain; None if every setting diverged
  margin: float
  level: float
  error: float  # standard deviation of a trial after removing settings and seeds; NaN if unknown
  pooled: bool  # whether one variance serves all settings
  gains_shown: bool  # whether the best setting is shown to be better than the base

  def state(self, name: str) -> str:
    return self.verdicts[name].state

  def names(self, state: str) -> list[str]:
    """The settings in one state, in the order given."""
    return [name for name, verdict in self.verdicts.items() if verdict.state == state]


def judge(gains: Gains, margin: float = MARGIN, level: float = LEVEL, added: np.ndarray | None = None) -> Judgement:
  """The verdicts on settings by their gains.

  `added` is the covariance (S, S) of errors of the settings' means that seeds do not show, such as that of the held-out
  text; it is added in quadrature. Nothing is concluded about, or against, a setting with fewer than SEEDS_NEEDED seeds.
  A setting with a diverged seed is never sufficient or insufficient; the others are compared with its finite seeds,
  which is too kind to it and therefore safe for them.
  """
  names = list(gains)
  finite = {name: {k: float(g) for k, g in gains[name].items() if math.isfinite(g)} for name in names}
  diverged = {name: len(gains[name]) - len(finite[name]) for name in names}
  fitted = [name for name in names if finite[name]]
  kept = [names.index(name) for name in fitted]
  contrasts = Contrasts([finite[name] for name in fitted], None if added is None else added[np.ix_(kept, kept)])
  eligible = {i for i, name in enumerate(fitted) if diverged[name] == 0 and len(finite[name]) >= SEEDS_NEEDED}
  gains_shown = contrasts.any_gain(level, eligible)
  insufficient = contrasts.insufficient(margin, level / 2, eligible) if gains_shown else {}
  best = max(range(len(fitted)), key=lambda i: contrasts.means[i], default=None)
  verdicts = {}
  for name in names:
    if name not in fitted:
      verdicts[name] = SettingVerdict(name, UNDECIDED, diverged[name], diverged[name], math.nan, math.nan, math.inf, (),
                                      None)
      continue
    i = fitted.index(name)
    worse_than = tuple(fitted[j] for j in insufficient.get(i, ()))
    testable = gains_shown and i in eligible and len(fitted) > 1
    comparable = testable and all(diverged[other] or len(finite[other]) >= SEEDS_NEEDED for other in fitted)
    state = UNDECIDED
    if worse_than:
      state = INSUFFICIENT
    elif comparable and contrasts.sufficient(i, margin, level):
      state = SUFFICIENT
    top = contrasts.means[best]
    verdicts[name] = SettingVerdict(
      name, state, len(gains[name]), diverged[name], float(contrasts.means[i]),
      float((top - contrasts.means[i]) / top) if top > 0 else math.nan,
      contrasts.at_most(i, level) if testable else math.inf,
      worse_than,
      contrasts.more_seeds(i, margin) if testable and state == UNDECIDED else None,
      tuple(fitted[j] for j in contrasts.open_against(i, margin, level)),
    )
  return Judgement(verdicts, None if best is None else fitted[best], margin, level, contrasts.error, contrasts.pooled,
                   gains_shown)


class Contrasts:
  """Least squares of gain = setting + seed + error, and tests of g_i − (1 − m) · g_j."""

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
    by_setting = [residuals[[row for row, (i, _, _) in enumerate(cells) if i == s]] for s in range(self.count)]
    self.pooled = not self._spreads_differ(by_setting)
    seed_effects = effects[self.count :]
    every = np.append(seed_effects, -seed_effects.sum()) if self.seeds_removed and n_seeds > 1 else np.zeros(1)
    self.seed_variance = float((every**2).sum() / max(len(every) - 1, 1) / len(every))  # of the mean over seeds

  def _spreads_differ(self, residuals: Sequence[np.ndarray]) -> bool:
    """Bartlett's test of equal variances. Each setting has lost a share of its degrees of freedom to the seeds."""
    total = sum(len(r) for r in residuals)
    dfs = np.array([self.df * len(r) / total for r in residuals])
    if self.count < 3 or self.df < 1 or dfs.min() <= 0.5:
      return False
    variances = np.array([float(r @ r) for r in residuals]) / dfs
    variances = np.maximum(variances, 1e-6 * max(variances.max(), 1e-300))
    pooled = float((dfs * variances).sum() / dfs.sum())
    statistic = dfs.sum() * math.log(pooled) - float((dfs * np.log(variances)).sum())
    correction = 1 + ((1 / dfs).sum() - 1 / dfs.sum()) / (3 * (self.count - 1))
    return bool(chdtrc(self.count - 1, statistic / correction) < SPREADS_DIFFER)

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
    if not self.pooled:
      return own
    if self.df < 1:
      return 1.0
    n = min(len(self.gains[i]), len(self.gains[j]))
    relaxed = max(1.0, RELAXED - (n - SEEDS_NEEDED) / 4)
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
    return {(i, j): _own_terms(self.gains[i], self.gains[j]) for i, j in pairs}

  def sufficient(self, i: int, margin: float, level: float) -> bool:
    """Whether every test of i against another setting holds."""
    return all(self.p_value(i, j, margin) < self._level(i, j, margin, level) for j in range(self.count) if j != i)

  def open_against(self, i: int, margin: float, level: float) -> list[int]:
    """The settings than which i is not shown to be less than the margin worse."""
    return [j for j in range(self.count) if j != i and self.p_value(i, j, margin) >= self._level(i, j, margin, level)]

  def _level(self, i: int, j: int, margin: float, level: float) -> float:
    """Half of `level` where the noise is as large as the margin."""
    by_seeds = self.variance * _quadratic(self._unit[i][j], 1 - margin)
    noisy = math.sqrt(by_seeds) > NOISY * margin * float(self.means.max()) if self.df > 0 else True
    return level / 2 if noisy else level

  def insufficient(self, margin: float, level: float, eligible: set[int]) -> dict[int, list[int]]:
    """i -> the settings than which it is shown to be more than the margin worse: Holm over all ordered pairs."""
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

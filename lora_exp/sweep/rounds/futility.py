"""The probability that the missing seeds of a sweep would give an answer (its predictive power).

Final means are drawn around the present means, with the variance that the missing seeds add under a flat prior. They
are judged by the rule of the last look in its normal approximation. Stopping for futility is not a conclusion: a sweep
that stops because an answer is improbable remains undecided.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtri

from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.judgement import Judgement

DRAWS = 2000


def chance_of_answer(
  judgement: Judgement, gains: Mapping[int, Mapping[int, float]], sizes: Mapping[int, float], most: int, level: float,
  text: np.ndarray | None,
) -> float:  # fmt: skip
  """The share of draws in which the smallest setting that is not insufficient is sufficient.

  `gains`: setting -> seed -> gain; `most`: seeds of each setting at the last look, which tests at `level`; `text`: the
  covariance (S, S) of the means over held-out documents, which no seed reduces. 1 if the error of a trial is not known.
  """
  verdicts = {n: judgement.verdicts[str(n)] for n in gains}
  order = sorted((n for n in gains if math.isfinite(verdicts[n].gain)), key=sizes.__getitem__)
  if not judgement.error > 0 or len(order) < 2:
    return 1.0
  positions = [list(gains).index(n) for n in order]
  errors = _contrast_errors(judgement, most, None if text is None else text[np.ix_(positions, positions)], len(order))
  finals = _draw_finals(judgement, [verdicts[n].gain for n in order], [len(gains[n]) for n in order], most)
  steady = np.array([verdicts[n].diverged == 0 and len(gains[n]) >= SEEDS_NEEDED for n in order])
  return _answered(finals, errors, judgement.margin, level, steady)


def _draw_finals(judgement: Judgement, means: Sequence[float], seeds: Sequence[int], most: int) -> np.ndarray:
  """Means (DRAWS, S) of the settings when each has `most` seeds."""
  seeds_so_far = np.clip(seeds, 1, most)
  moves = judgement.error * np.sqrt(1 / seeds_so_far - 1 / most)
  draws = np.random.default_rng(0).standard_normal((DRAWS, len(means)))
  return np.array(means) + moves * draws


def _contrast_errors(judgement: Judgement, most: int, text: np.ndarray | None, settings: int) -> np.ndarray:
  """The standard errors (S, S) of g_i − (1 − m) · g_j with `most` seeds."""
  weight = 1 - judgement.margin
  variance = np.full((settings, settings), judgement.error**2 * (1 + weight**2) / most)
  if text is not None:
    of_mean = np.diag(text)
    variance += np.maximum(of_mean[:, None] - 2 * weight * text + weight**2 * of_mean[None, :], 0.0)
  return np.sqrt(variance)


def _answered(finals: np.ndarray, errors: np.ndarray, margin: float, level: float, steady: np.ndarray) -> float:
  """The share of the draws `finals` (DRAWS, S), settings by size, that have an answer. Only steady settings can be it.
  """
  z = (finals[:, :, None] - (1 - margin) * finals[:, None, :]) / errors  # (DRAWS, i, j)
  others = ~np.eye(len(errors), dtype=bool)
  shown_worse = (z < ndtri(level / 2 / others.sum())) & others
  shown_close = (z > -ndtri(level)) | ~others
  insufficient, sufficient = shown_worse.any(2) & steady, shown_close.all(2) & steady
  candidates = ~insufficient & steady
  rows, first = np.arange(len(finals)), candidates.argmax(1)
  return float(np.mean(candidates[rows, first] & sufficient[rows, first]))

"""The probability that the missing seeds of a sweep would give an answer (its predictive power).

Final means are drawn around the present means, with the variance that the missing seeds add under a flat prior. They
are judged by the rule of the last look in its normal approximation. Stopping for futility makes no claim: a sweep that
stops because an answer is improbable remains undecided.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import ndtri

from lora_exp.report.verdicts.judgement import SEEDS_NEEDED, Judgement

DRAWS = 2000


def chance_of_answer(
  judgement: Judgement, gains: Mapping[int, Mapping[int, float]], sizes: Mapping[int, float], most: int, level: float,
  text: np.ndarray | None,
) -> float:  # fmt: skip
  """The share of draws in which the smallest setting that is not insufficient is sufficient.

  `gains`: setting -> seed -> gain; `most`: seeds of each setting at the last look, which tests at `level`; `text`: the
  covariance of the means over held-out documents, which no seed reduces. 1 if the error of a trial is not known.
  """
  order = sorted((n for n in gains if math.isfinite(judgement.verdicts[str(n)].gain)), key=sizes.__getitem__)
  if not judgement.error > 0 or len(order) < 2:
    return 1.0
  means = np.array([judgement.verdicts[str(n)].gain for n in order])
  seeds = np.array([min(max(len(gains[n]), 1), most) for n in order])
  steady = np.array([judgement.verdicts[str(n)].diverged == 0 and seeds[i] >= SEEDS_NEEDED
                     for i, n in enumerate(order)])
  moves = judgement.error * np.sqrt(1 / seeds - 1 / most)
  finals = means + moves * np.random.default_rng(0).standard_normal((DRAWS, len(order)))
  z = _z_values(finals, judgement, most, text, [list(gains).index(n) for n in order])
  ordered_pairs = len(order) * (len(order) - 1)
  insufficient = (z < ndtri(level / 2 / ordered_pairs)).any(2) & steady
  sufficient = (z > -ndtri(level)).all(2) & steady
  first = np.argmax(~insufficient & steady, axis=1)  # only steady settings can be the answer: see `looks`
  rows = np.arange(DRAWS)
  return float(np.mean(sufficient[rows, first] & ~insufficient[rows, first]))


def _z_values(
  finals: np.ndarray, judgement: Judgement, most: int, text: np.ndarray | None, positions: Sequence[int]
) -> np.ndarray:
  """(draw, i, j) -> g_i − (1 − m) · g_j in standard errors. It is infinity for i = j, so that every test passes."""
  weight = 1 - judgement.margin
  variance = np.full((len(positions),) * 2, judgement.error**2 * (1 + weight**2) / most)
  if text is not None:
    covariance = text[np.ix_(positions, positions)]
    diagonal_terms = np.diag(covariance)
    text_variance = diagonal_terms[:, None] - 2 * weight * covariance + weight**2 * diagonal_terms[None, :]
    variance = variance + np.maximum(text_variance, 0.0)
  z: np.ndarray = (finals[:, :, None] - weight * finals[:, None, :]) / np.sqrt(variance)
  diagonal = np.arange(len(positions))
  z[:, diagonal, diagonal] = np.inf
  return z

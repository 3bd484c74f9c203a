"""The error that comes from the choice of held-out documents: settings are scored on the same ones."""

from collections.abc import Sequence

import numpy as np
from scipy.stats import bootstrap

from lora_exp.report.reading.document_losses import DocumentLosses

RESAMPLES = 2000


def text_covariance(gains: Sequence[np.ndarray], tokens: np.ndarray) -> np.ndarray:
  """The covariance (S, S) of S gains per token over D documents that were drawn at random.

  `gains`: for each setting the nats gained on each document, (D,); `tokens` (D,). A gain per token is a ratio of two
  sums over documents, so its variance is that of Σ (gain − mean · tokens) / Σ tokens (linearised).
  """
  total = float(tokens.sum())
  influence_SD = np.stack([(gain - gain.sum() / total * tokens) / total for gain in gains])
  count = len(tokens)
  return influence_SD @ influence_SD.T * count / max(count - 1, 1)


def mean_gains_covariance(documents: Sequence[Sequence[DocumentLosses | None]]) -> np.ndarray | None:
  """The covariance (S, S) of the mean gains of S settings over held-out documents.

  `documents`: the losses of the runs of each setting. None unless every run kept them, and of the same documents.
  """
  known = [[losses for losses in of_setting if losses is not None] for of_setting in documents]
  if not known or any(not of_setting for of_setting in documents):
    return None
  if any(len(kept) < len(of_setting) for kept, of_setting in zip(known, documents, strict=True)):
    return None
  tokens = known[0][0].tokens
  if any(not np.array_equal(losses.tokens, tokens) for kept in known for losses in kept):
    return None
  gains_SD = [np.mean([losses.base - losses.exported for losses in kept], axis=0) for kept in known]
  return text_covariance(gains_SD, tokens)


def short_interval(worse: np.ndarray, better: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
  """How far one gain is short of another, as a share of that, with its 95 % interval over documents.

  `worse`, `better`: nats gained on each document by two runs, (D,). Paired bootstrap: documents are drawn together.
  """

  def short(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
      return 1 - a.sum(axis) / b.sum(axis)

  rng = np.random.default_rng(seed)
  result = bootstrap((worse, better), short, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
                     rng=rng)
  low, high = result.confidence_interval
  return float(short(worse, better)), float(low), float(high)

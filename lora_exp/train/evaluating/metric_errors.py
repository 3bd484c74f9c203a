"""Standard errors of held-out metrics, and of the difference of two models on the same batches."""

import math

import numpy as np

from lora_exp.config.metrics import Metric
from lora_exp.train.evaluating.evaluation import Evaluation


def difference(metric: Metric, trained: Evaluation, base: Evaluation) -> tuple[float, float | None]:
  """The difference `trained` - `base` of a metric and its standard error, which is None for a single batch.

  Both models are evaluated on the same batches, so only the differences within batches (or answers) contribute to the
  error. It is estimated by the infinitesimal jackknife over batches (Efron, 1982, chapter 6), which for a ratio of sums
  equals Cochran's ratio estimate (1977, section 6.4).
  """
  change = metric.value(trained.sums) - metric.value(base.sums)
  return change, _standard_error(_influence(metric, trained) - _influence(metric, base))


def standard_error(metric: Metric, evaluation: Evaluation) -> float | None:
  """The standard error of a metric, estimated as in `difference`; None for a single batch."""
  return _standard_error(_influence(metric, evaluation))


def _standard_error(influence_K: np.ndarray) -> float | None:
  """The jackknife estimate of the standard error; None for a single batch."""
  batches = len(influence_K)
  if batches < 2:
    return None
  return float(math.sqrt(batches / (batches - 1) * (influence_K**2).sum()))


def _influence(metric: Metric, evaluation: Evaluation, step: float = 1e-4) -> np.ndarray:
  """The derivative (K,) of a metric with respect to the weight of each batch or answer, by central differences."""

  def at_weight(part: int, weight: float) -> float:
    """The metric with the weight of one part increased by `weight`."""
    return metric.value({name: evaluation.sums[name] + weight * evaluation.parts[name][part] for name in metric.sums})

  parts = range(len(evaluation.parts[metric.sums[-1]]))
  return np.array([(at_weight(k, step) - at_weight(k, -step)) / (2 * step) for k in parts])

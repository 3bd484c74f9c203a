"""Which settings are dropped early in their training, because they will be far short of the best.

Finished trials of the same sweep show how well the gain at an early step predicts the final one: a line is fitted to
the two, and its error is that of each trial's prediction by the line through the others. A setting is dropped if its
predicted gain is more than the margin short of the best one's even after that error. Both gains are of the tuning half
of the held-out text, which scores nothing.

    final = intercept + slope * early,    error = sqrt(mean over trials of (residual / (1 - leverage))^2)

A dropped setting is not judged, so that the verdicts on the others keep their error rates; that a setting within the
margin is dropped has at most the probability DROP_LEVEL if errors are normal.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from lora_exp.config.metrics import Metric
from lora_exp.report.reading.run_record import RunRecord

DROP_LEVEL = 0.005
FEWEST_TRIALS = 5  # that measure the error of the prediction


@dataclass(frozen=True)
class Prediction:
  """The final gain by the gain at `step`."""

  step: int
  of_steps: int  # the last step
  slope: float
  intercept: float
  error: float  # standard deviation of the prediction for one trial, by leaving out one trial at a time
  trials: int

  def final(self, early: float) -> float:
    return self.intercept + self.slope * early


@dataclass(frozen=True)
class Drop:
  """A setting that is dropped: its predicted shortfall in shares of the best predicted gain, as a range."""

  short: float
  least: float  # lower bound of `short` at the level of one setting

  def reason(self, prediction: Prediction, margin: float) -> str:
    return (f"at step {prediction.step} of {prediction.of_steps}, predicted to be {self.short:.0%} short of the best "
            f"gain, at least {self.least:.0%} (margin {margin:.0%}), by {prediction.trials} finished trials")


def predict(finished: Iterable[RunRecord], metric: Metric, share: float) -> Prediction | None:
  """The prediction from the last step that is at most `share` of the training, and that all finished runs evaluated.

  None with fewer than FEWEST_TRIALS trials, or if their early gains are equal.
  """
  curves = [curve for run in finished if run.status == "done" and len(curve := gain_curve(run, metric)) > 1]
  if len(curves) < FEWEST_TRIALS:
    return None
  last = max(max(curve) for curve in curves)
  steps = [step for step in set.intersection(*map(set, curves)) if 0 < step <= share * last]
  if not steps:
    return None
  return fit_prediction(max(steps), last, [(curve[max(steps)], curve[max(curve)]) for curve in curves])


def fit_prediction(step: int, last: int, pairs: Sequence[tuple[float, float]]) -> Prediction | None:
  """The line through pairs (early gain, final gain)."""
  early, final = np.array(pairs).T
  spread = early - early.mean()
  total = float(spread @ spread)
  if total <= 1e-12 * float(early @ early):
    return None
  slope = float(spread @ final) / total
  intercept = float(final.mean() - slope * early.mean())
  residuals = final - intercept - slope * early
  left_out = residuals / np.maximum(1 - 1 / len(early) - spread**2 / total, 1e-9)
  return Prediction(step, last, slope, intercept, float(np.sqrt(np.mean(left_out**2))), len(early))


def drops(early: Mapping[int, Sequence[float]], prediction: Prediction, margin: float) -> dict[int, Drop]:
  """The settings to drop by their early gains, one for each seed; `margin` is a share of the best predicted gain."""
  final = {n: prediction.final(float(np.mean(gains))) for n, gains in early.items() if gains}
  if len(final) < 2 or max(final.values()) <= 0:
    return {}
  best = max(final.values())
  quantile = float(stdtrit(prediction.trials - 2, 1 - DROP_LEVEL / (len(final) - 1)))
  least = {n: 1 - (gain + quantile * prediction.error * math.sqrt(1 + (1 - margin) ** 2)) / best
           for n, gain in final.items()}
  return {n: Drop(1 - gain / best, least[n]) for n, gain in final.items() if least[n] > margin}


def gain_curve(run: RunRecord, metric: Metric) -> dict[int, float]:
  """Step -> gain over the base of the state that the run would export if it ended there; {} without evaluations."""
  losses, values = dict(run.tuning_curve("loss")), dict(run.tuning_curve(metric.name))
  if 0 not in values:
    return {}
  gains, best, exported = {}, math.inf, 0
  for step in sorted(step for step in losses.keys() & values.keys() if step > 0):
    if losses[step] < best or run.config.get("train.export") == "last":
      best, exported = losses[step], step
    gains[step] = metric.sign * (values[0] - values[exported])
  return gains

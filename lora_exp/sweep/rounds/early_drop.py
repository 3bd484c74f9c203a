"""Chooses the settings that are dropped early in training, because their gain will be far short of the best.

A line that predicts the final gain from the gain at an early step is fitted to the finished trials of the sweep. Its
error is found by predicting each trial from the others (leave-one-out). A setting is dropped if its predicted gain,
plus an allowance for this error, is more than the margin short of the best. All gains are on the tuning half of the
held-out text, which does not score trials.

    final = intercept + slope * early,    error = sqrt(mean over trials of (residual / (1 - leverage))^2)

Dropped settings are not judged, so the verdicts on the others keep their error rates. If errors are normal, the
probability that any setting within the margin is dropped is at most DROP_LEVEL.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from lora_exp.config.metrics import Metric
from lora_exp.report.reading.run_record import RunRecord

DROP_LEVEL = 0.005
FEWEST_TRIALS = 5  # finished trials from which the error of the prediction can be estimated


@dataclass(frozen=True)
class Prediction:
  """A line that predicts the final gain of a trial from its gain at `step`."""

  step: int
  of_steps: int  # the last step
  slope: float
  intercept: float
  error: float  # standard deviation of the prediction for one trial, by leave-one-out
  trials: int  # to which the line is fitted

  def final(self, early: float) -> float:
    return self.intercept + self.slope * early


@dataclass(frozen=True)
class Drop:
  """The predicted shortfall of a setting that is dropped, as a share of the best predicted gain."""

  short: float
  least: float  # lower bound of `short`, at DROP_LEVEL shared by all settings

  def reason(self, prediction: Prediction, margin: float) -> str:
    return (f"at step {prediction.step} of {prediction.of_steps}, predicted to be {self.short:.0%} short of the best "
            f"gain, and at least {self.least:.0%} (margin {margin:.0%}), from {prediction.trials} finished trials")


def predict(finished: Iterable[RunRecord], metric: Metric, share: float) -> Prediction | None:
  """Fits the prediction at the last step that all finished runs evaluated within the first `share` of the training.

  None if fewer than FEWEST_TRIALS trials are finished, or if their early gains are equal.
  """
  curves = [gain_curve(run, metric) for run in finished if run.status == "done"]
  curves = [curve for curve in curves if len(curve) > 1]
  if len(curves) < FEWEST_TRIALS:
    return None
  last = max(max(curve) for curve in curves)
  steps = [step for step in set.intersection(*map(set, curves)) if 0 < step <= share * last]
  if not steps:
    return None
  return fit_prediction(max(steps), last, [(curve[max(steps)], curve[max(curve)]) for curve in curves])


def fit_prediction(step: int, last: int, pairs: Sequence[tuple[float, float]]) -> Prediction | None:
  """Fits the line to pairs (early gain, final gain). None if the early gains are equal."""
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
  """The settings to drop. `early`: setting -> early gain of each seed; `margin`: a share of the best predicted gain."""
  final = {n: prediction.final(float(np.mean(gains))) for n, gains in early.items() if gains}
  if len(final) < 2 or max(final.values()) <= 0:
    return {}
  best = max(final.values())
  quantile = float(stdtrit(prediction.trials - 2, 1 - DROP_LEVEL / (len(final) - 1)))
  least = {n: 1 - (gain + quantile * prediction.error * math.sqrt(1 + (1 - margin) ** 2)) / best
           for n, gain in final.items()}
  return {n: Drop(1 - gain / best, least[n]) for n, gain in final.items() if least[n] > margin}


def gain_curve(run: RunRecord, metric: Metric) -> dict[int, float]:
  """Step -> gain over the base of the state that the run would export if it ended at this step; {} if not evaluated."""
  losses, values = dict(run.tuning_curve("loss")), dict(run.tuning_curve(metric.name))
  if 0 not in values:
    return {}
  gains, best, exported = {}, math.inf, 0
  for step in sorted(step for step in losses.keys() & values.keys() if step > 0):
    if losses[step] < best or run.config.get("train.export") == "last":
      best, exported = losses[step], step
    gains[step] = metric.sign * (values[0] - values[exported])
  return gains

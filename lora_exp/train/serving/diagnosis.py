"""What differs between a server and an answer card. Numbers alone: no jax, no network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from lora_exp.train.serving.card_file import ADAPTED, BASE, WITHOUT, scale_of

EXPLAINED = 0.15  # a cause is accepted if it leaves at most this share of the difference
FACTORS = 1000  # factors between the smallest and the largest of the card that are tried
QUANTISED = 0.5  # largest share by which the adapter's effect differs on a quantised base
NEAR = 0.5  # with a measured base: share of the difference from the card's base that must be the same
NOT_APPLIED = "the adapter is not applied: the server answers as the base does"
Cause = tuple[float, str, str]  # what it leaves unexplained, the kind of fault, and a sentence


@dataclass(frozen=True)
class Measured:
  """What a server answers. A value is NaN where the server gives none."""

  adapted: list[list[float]]  # log-probabilities of every continuation, as in the card
  base: list[list[float]] | None = None  # of the server's base, if it can be asked without the adapter
  template: str | None = None  # the problem with how the server renders or tokenises prompts, or None


@dataclass(frozen=True)
class Diagnosis:
  """The result of a comparison."""

  fault: str | None  # a word for the kind of fault; None if there is none
  text: str  # one sentence
  largest: float  # largest difference of a log-probability from the card's adapted model, in nats
  count: int  # compared tokens


def diagnose(card: Mapping[str, Any], measured: Measured, tolerance: float) -> Diagnosis:
  """Compares a server with a card.

  `tolerance` is the largest allowed difference of a log-probability, in nats.
  """
  models = {name: _flat(rows) for name, rows in card["logprobs"].items()}
  given = _flat(measured.adapted)
  known = np.isfinite(given)
  if not known.any():
    return Diagnosis("unknown", "the server gives no log-probability of any token of the card", math.nan, 0)
  models = {name: values[known] for name, values in models.items()}
  given, count = given[known], int(known.sum())
  difference = given - models[ADAPTED]
  largest = float(np.abs(difference).max())
  effect = float(np.abs(models[ADAPTED] - models[BASE]).max())
  if largest > tolerance:
    own_base = None if measured.base is None else _flat(measured.base)[known]
    return Diagnosis(*_fault(models, given, own_base, tolerance), largest, count)
  if measured.template is not None:
    return Diagnosis("template", measured.template, largest, count)
  if effect <= 2 * tolerance:
    text = (f"the log-probabilities are right, but the adapter changes them by {effect:.2g} nats at most, so that this "
            f"card cannot tell the adapted model from its base at a tolerance of {tolerance:g}")
    return Diagnosis("unclear", text, largest, count)
  return Diagnosis(None, "the server computes the adapted model", largest, count)


def _fault(
  models: Mapping[str, np.ndarray], given: np.ndarray, own_base: np.ndarray | None, tolerance: float
) -> tuple[str, str]:
  """(kind, sentence) of the fault that explains the difference best.

  `given` are the log-probabilities of the server, and `own_base` those of its base if they were measured.
  """
  if own_base is not None:
    problem = _base_problem(models, given, own_base, tolerance)
    if problem is not None:
      return "base", problem
  not_applied = _rms(given - models[BASE])
  answers_as_base = own_base is not None and _worst(given, own_base) <= tolerance
  if not_applied <= tolerance or answers_as_base:
    return "not applied", NOT_APPLIED
  causes = [_scale_cause(models, given), *_missing_causes(models, given)]
  if own_base is None:
    causes.append((not_applied, "not applied", NOT_APPLIED))
  residual, kind, text = min(causes)
  if residual <= max(tolerance, EXPLAINED * _rms(given - models[ADAPTED])):
    return kind, text
  if own_base is not None:
    return "adapter", ("the base is right, so the adapter's values differ: another adapter, or tensors in another "
                       "order")
  return "base", "another base or another adapter: no wrong scale and no missing part explains the answers"


def _base_problem(
  models: Mapping[str, np.ndarray], given: np.ndarray, own_base: np.ndarray, tolerance: float
) -> str | None:
  """The problem with the server's base; None if it is the base of the card."""
  distance, error = _worst(own_base, models[BASE]), _worst(given, models[ADAPTED])
  if distance <= max(tolerance, NEAR * error):
    return None
  text = (f"another base: without the adapter, its log-probabilities differ by up to {distance:.2g} nats from those of "
          "the base that was trained on")
  effect = models[ADAPTED] - models[BASE]
  both = np.isfinite(own_base)
  if both.any() and _rms((given - own_base - effect)[both]) <= QUANTISED * _rms(effect[both]):
    text += (". The adapter changes them as it should, so this may be the same base in fewer bits: serve it as f16, "
             f"or allow verify.tolerance={2 * error:.1g}")
  return text


def _scale_cause(models: Mapping[str, np.ndarray], given: np.ndarray) -> Cause:
  """A wrong scale."""
  residual, factor = _best_scale(models, given)
  return residual, "scale", f"the update is multiplied by about {factor:.2g}: check alpha, rank and use_rslora"


def _missing_causes(models: Mapping[str, np.ndarray], given: np.ndarray) -> list[Cause]:
  """A missing part of the adapter, for each part of which the card has the model without it."""
  return [
    (_rms(given - values), "missing", f"the adapter of {name.removeprefix(WITHOUT)} is missing")
    for name, values in models.items()
    if name.startswith(WITHOUT)
  ]


def _best_scale(models: Mapping[str, np.ndarray], given: np.ndarray) -> tuple[float, float]:
  """(residual, factor) of the multiple of the update that fits best.

  Between the card's factors the log-probabilities are interpolated, by cubic splines in the logarithm of the factor.
  """
  grid = {factor: values for name, values in models.items() if (factor := scale_of(name)) is not None}
  grid[1.0] = models[ADAPTED]
  best = min(((_rms(given - values), factor) for factor, values in grid.items()), default=(math.inf, 1.0))
  positive = sorted(factor for factor in grid if factor > 0)
  if len(positive) < 4:
    return best
  curve = CubicSpline(np.log(positive), np.stack([grid[factor] for factor in positive]))
  factors = np.geomspace(positive[0], positive[-1], FACTORS)
  residuals = np.sqrt(np.square(curve(np.log(factors)) - given).mean(axis=1))
  nearest = int(residuals.argmin())
  return min(best, (float(residuals[nearest]), float(factors[nearest])))


def _flat(rows: Sequence[Sequence[float]]) -> np.ndarray:
  return np.array([math.nan if x is None else x for row in rows for x in row], np.float64)


def _rms(x: np.ndarray) -> float:
  return float(np.sqrt(np.mean(np.square(x)))) if len(x) else 0.0


def _worst(a: np.ndarray, b: np.ndarray) -> float:
  """The largest difference; NaN values are left out."""
  differences = np.abs(a - b)
  differences = differences[np.isfinite(differences)]
  return float(differences.max()) if len(differences) else 0.0

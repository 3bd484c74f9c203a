"""What differs between a server and an answer card. Numbers alone: no jax, no network."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from lora_exp.train.serving.card_file import ADAPTED, BASE, scale_of

EXPLAINED = 0.15  # a cause is accepted if it leaves at most this share of the difference
FACTORS = 1000  # factors between the smallest and the largest of the card that are tried
QUANTISED = 0.5  # largest share by which the adapter's effect differs on a quantised base
NEAR = 0.5  # with a measured base: share of the difference from the card's base that must be the same


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
  fault = None if largest <= tolerance else _fault(models, given, measured, card, tolerance)
  if fault is not None:
    return Diagnosis(*fault, largest, count)
  if measured.template is not None:
    return Diagnosis("template", measured.template, largest, count)
  if effect <= 2 * tolerance:
    text = (f"the log-probabilities are right, but the adapter changes them by {effect:.2g} nats at most, so that this "
            f"card cannot tell the adapted model from its base at a tolerance of {tolerance:g}")
    return Diagnosis("unclear", text, largest, count)
  return Diagnosis(None, "the server computes the adapted model", largest, count)


def _fault(
  models: Mapping[str, np.ndarray], given: np.ndarray, measured: Measured, card: Mapping[str, Any], tolerance: float
) -> tuple[str, str]:
  """(kind, sentence) of the fault that explains the difference best."""
  own_base = None if measured.base is None else _flat(measured.base)[np.isfinite(_flat(measured.adapted))]
  if own_base is not None and _worst(own_base, models[BASE]) > max(tolerance, NEAR * _worst(given, models[ADAPTED])):
    text = (f"another base: without the adapter, its log-probabilities differ by up to "
            f"{_worst(own_base, models[BASE]):.2g} nats from those of the base that was trained on")
    effect = models[ADAPTED] - models[BASE]
    both = np.isfinite(own_base)
    if both.any() and _rms((given - own_base - effect)[both]) <= QUANTISED * _rms(effect[both]):
      text += (". The adapter changes them as it should, so this may be the same base in fewer bits: serve it as f16, "
               f"or allow verify.tolerance={2 * _worst(given, models[ADAPTED]):.1g}")
    return "base", text
  total = _rms(given - models[ADAPTED])
  allowed = max(tolerance, EXPLAINED * total)
  not_applied = _rms(given - models[BASE])
  if not_applied <= tolerance or own_base is not None and _worst(given, own_base) <= tolerance:
    return "not applied", "the adapter is not applied: the server answers as the base does"
  causes: list[tuple[float, str, str]] = []
  if own_base is None:
    causes.append((not_applied, "not applied", "the adapter is not applied: the server answers as the base does"))
  residual, factor = _best_scale(models, given)
  text = f"the update is multiplied by about {factor:.2g}: check alpha, rank and use_rslora"
  causes.append((residual, "scale", text))
  for name, values in models.items():
    if name.startswith("without "):
      what = name.removeprefix("without ")
      causes.append((_rms(given - values), "missing", f"the adapter of {what} is missing"))
  residual, kind, text = min(causes)
  if residual <= allowed:
    return kind, text
  same_base = own_base is not None
  rest = ("the base is right, so the adapter's values differ: another adapter, or tensors in another order" if same_base
          else "another base or another adapter: no wrong scale and no missing part explains the answers")
  return "adapter" if same_base else "base", rest


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

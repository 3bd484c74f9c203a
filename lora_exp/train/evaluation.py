"""Evaluation: sums over held-out batches, and the metrics that `config/metrics.py` makes of them.

Training, the pretraining of a base and `task=evaluate` all call `held_out`.

Three sums come with the loss, in training too: `loss`, `nats` and `correct` (`step.loss_sums`). `SUMS` are computed on
the devices from a trial's predictions on a held-out batch. `COUNTS` follow from the batch alone, also in training. Each
is a function that returns a number, or None where a batch has no such thing: rows without a prompt have no `exact`. To
add a sum, write such a function and enter it under its name. A sum over logits uses `Predictions.map_logits`, as
`_exact` does; the logits of a whole batch are never in memory at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import DataConfig
from lora_exp.config.metrics import Metric, metric_values
from lora_exp.data.sources import is_numeric
from lora_exp.data.tokenizers import Tokenizer
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.train.hyperparameters import Hyperparameters
from lora_exp.train.loss import Sums, example_loss
from lora_exp.train.program import Program, Tree, assemble
from lora_exp.train.step import Batch, features, loss_sums, over_trials, token_loss

POSITIONS = 8  # whose logits are in memory at once


@dataclass(frozen=True)
class Predictions:
  """A trial's predictions on a batch, without dropout; used inside a trace."""

  batch: Batch  # arrays (B, T) of text, (B, …) of examples of numbers
  loss: Sums  # of the batch, over targets with a weight
  model: LanguageModel
  x_BTD: jax.Array | None = None  # of text: features before the head
  z_BO: jax.Array | None = None  # of examples of numbers: logits of classes, or the predicted numbers

  def map_logits(self, function: Callable[..., jax.Array], *columns_BT: jax.Array) -> jax.Array:
    """(B, T) of `function(logits (B, V), *columns (B,))` at each position; of text only."""
    return map_logits(self.model, self.x_BTD, function, *columns_BT)


def map_logits(
  model: LanguageModel, x_BTD: jax.Array | None, function: Callable[..., jax.Array], *columns_BT: jax.Array
) -> jax.Array:
  """(B, T) of `function(logits (B, V), *columns (B,))` at each position; 8 positions are in memory at once."""
  assert x_BTD is not None

  def at_position(arrays: tuple[jax.Array, ...]) -> jax.Array:
    x_BD, *columns_B = arrays
    return function(model.logits(x_BD), *columns_B)

  positions = (jnp.moveaxis(x_BTD, 1, 0), *(column_BT.T for column_BT in columns_BT))
  return jax.lax.map(at_position, positions, batch_size=POSITIONS).T


def _exact(predictions: Predictions) -> jax.Array | None:
  """Rows in which every token of the response is the most likely one; None if no row has a response."""
  batch = predictions.batch
  if "answers" not in batch:
    return None
  right_BT = predictions.map_logits(_most_likely) == batch["targets"]
  exact_B = batch["answers"].any(1) & (right_BT | ~batch["answers"]).all(1)
  return exact_B.sum(dtype=jnp.float32)


def _most_likely(logits_BV: jax.Array) -> jax.Array:
  return logits_BV.argmax(-1)


# Sums of a model's predictions, besides those that come with the loss (`step.loss_sums`).
SUMS: dict[str, Callable[[Predictions], jax.Array | None]] = {
  "exact": _exact,
}


def _count(batch: Batch, byte_lengths: np.ndarray | None) -> float:
  """Targets with a weight: tokens, or examples of numbers."""
  return float(np.asarray(batch["weights"]).sum(dtype=np.float64))


def _responses(batch: Batch, byte_lengths: np.ndarray | None) -> float | None:
  """Rows with a response to a prompt."""
  return float(np.asarray(batch["answers"]).any(1).sum()) if "answers" in batch else None


def _bytes(batch: Batch, byte_lengths: np.ndarray | None) -> float | None:
  """UTF-8 bytes of the target tokens with a weight; a control token has none."""
  if byte_lengths is None or "targets" not in batch:
    return None
  weighted = np.asarray(batch["weights"]) > 0
  return float(byte_lengths[np.asarray(batch["targets"])[weighted]].sum())


# Numbers of a batch that no model is needed for; also of the batches of training.
COUNTS: dict[str, Callable[[Batch, np.ndarray | None], float | None]] = {
  "count": _count,
  "responses": _responses,
  "bytes": _bytes,
}


class EvalBatch(NamedTuple):
  """A held-out batch on the devices."""

  arrays: dict[str, Any]  # with a teacher, also its features and its head
  counts: dict[str, float]  # those of COUNTS that the batch has


def byte_lengths(cfg: DataConfig, tokenizer: Tokenizer) -> np.ndarray | None:
  """Bytes of each token id (V,); None where targets are not all text: examples of numbers, padding in the loss."""
  padding_counts = cfg.packing == "pad" and cfg.pad_in_loss
  return None if is_numeric(cfg) or padding_counts else tokenizer.byte_lengths


def count_batch(batch: Batch, byte_lengths: np.ndarray | None = None) -> dict[str, float]:
  """The COUNTS of a batch; those that it does not have are left out."""
  counts = {name: count(batch, byte_lengths) for name, count in COUNTS.items()}
  return {name: value for name, value in counts.items() if value is not None}


def put_eval_batches(
  batches: Iterable[Batch], put: Callable[[Batch], dict[str, Any]], byte_lengths: np.ndarray | None = None
) -> Iterator[EvalBatch]:
  """The batches on the devices, one at a time. `byte_lengths` (V,): bytes of each token; None if they do not matter."""
  for batch in batches:
    yield EvalBatch(put(batch), count_batch(batch, byte_lengths))


def eval_step(
  program: Program, params: Tree, trials: Hyperparameters, frozen: Tree, batch: Batch
) -> dict[str, jax.Array]:
  """The sums of the loss and the SUMS of a batch, (N,) for N trials, without dropout."""

  def one_trial(trial: Hyperparameters, params: Tree) -> dict[str, jax.Array]:
    model: Any = assemble(program, params, trial, frozen, None)
    if "x" in batch:
      z_BO = model(batch["x"])
      loss = example_loss(z_BO, batch["y"], batch["weights"])
      predictions = Predictions(batch, loss, model, z_BO=z_BO)
    else:
      x_BTD = features(model, batch)
      loss = token_loss(program, model, x_BTD, batch)
      predictions = Predictions(batch, loss, model, x_BTD)
    sums = {name: compute(predictions) for name, compute in SUMS.items()}
    return loss_sums(batch, loss) | {name: value for name, value in sums.items() if value is not None}

  return over_trials(one_trial, program.mapping, trials, params)


@dataclass(frozen=True)
class Evaluation:
  """What one trial's model scores on held-out batches."""

  batch_sums: dict[str, np.ndarray]  # name of a sum or count -> (K,) float64, of each batch
  sums: dict[str, float]  # the same over all batches

  @property
  def metrics(self) -> dict[str, float]:
    """Every metric that applies, by name."""
    return metric_values(self.sums)

  def row(self) -> dict[str, float | int]:
    """Its metrics, the number of targets (`counted`) and, where rows have them, of responses (`examples`)."""
    counts = {"counted": int(self.sums["count"])}
    if "responses" in self.sums:
      counts["examples"] = int(self.sums["responses"])
    return self.metrics | counts


def held_out(
  evaluate: Callable[..., dict[str, jax.Array]],
  params: Tree,
  trials: Hyperparameters,
  frozen: Tree,
  batches: Iterable[EvalBatch],
) -> list[Evaluation]:
  """The evaluation of each of N trials on K batches; every target weighs the same.

  `evaluate` is the compiled `eval_step`; `params` and `trials` have a leading axis N.
  """
  device_sums, counts = [], []
  for batch in batches:
    device_sums.append(evaluate(params, trials, frozen, batch.arrays))
    counts.append(batch.counts)
  sums_KN = {name: np.array([np.asarray(sums[name], np.float64) for sums in device_sums]) for name in device_sums[0]}
  counts_K = {name: np.array([batch_counts[name] for batch_counts in counts]) for name in counts[0]}
  totals_N = {name: values_KN.sum(axis=0) for name, values_KN in sums_KN.items()}
  totals = {name: float(values_K.sum()) for name, values_K in counts_K.items()}
  evaluations = []
  for n in range(len(totals_N["loss"])):
    batch_sums = {name: values_KN[:, n] for name, values_KN in sums_KN.items()}
    sums = {name: float(values_N[n]) for name, values_N in totals_N.items()}
    evaluations.append(Evaluation(batch_sums | counts_K, sums | totals))
  return evaluations


def difference(metric: Metric, trained: Evaluation, base: Evaluation) -> tuple[float, float | None]:
  """How far a metric of `trained` lies above that of `base`, and its standard error; None for one batch.

  Both read the same batches, so that only the difference within a batch varies. The error is that of the infinitesimal
  jackknife over batches (Efron, 1982, chapter 6), which for a ratio of sums is Cochran's ratio estimate (1977, 6.4).
  """
  change = metric.value(trained.sums) - metric.value(base.sums)
  return change, _standard_error(_influence(metric, trained) - _influence(metric, base))


def standard_error(metric: Metric, evaluation: Evaluation) -> float | None:
  """The standard error of a metric over batches, as in `difference`; None for one batch."""
  return _standard_error(_influence(metric, evaluation))


def _standard_error(influence_K: np.ndarray) -> float | None:
  batches = len(influence_K)
  if batches < 2:
    return None
  return float(math.sqrt(batches / (batches - 1) * (influence_K**2).sum()))


def _influence(metric: Metric, evaluation: Evaluation, step: float = 1e-4) -> np.ndarray:
  """(K,) the derivative of a metric with respect to the weight of each batch, by central differences."""

  def at_weight(batch: int, weight: float) -> float:
    """The metric with `weight` more of the batch."""
    sums = {name: total + weight * evaluation.batch_sums[name][batch] for name, total in evaluation.sums.items()}
    return metric.value(sums)

  batches = range(len(evaluation.batch_sums["count"]))
  return np.array([(at_weight(k, step) - at_weight(k, -step)) / (2 * step) for k in batches])

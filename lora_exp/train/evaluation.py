"""Evaluation: sums over held-out batches, and the metrics that `config/metrics.py` makes of them.

Training, the pretraining of a base and `task=evaluate` all call `held_out`.

A metric is a ratio of sums over the held-out data. There are three kinds of sums:

- `loss`, `nats` and `correct` are computed with the loss, in training too (`step.loss_sums`).
- `SUMS` are computed on the devices from a trial's predictions on a held-out batch.
- `COUNTS` depend only on the batch and are computed in training too.

To add a sum, write a function and enter it in `SUMS` or `COUNTS`. It returns a number, or None if it does not apply to
the batch; `exact`, for instance, needs rows with a prompt. A sum over logits uses `Predictions.map_logits`, as `_exact`
does, because the logits of a batch are never in memory all at once.
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

POSITIONS = 8  # number of positions whose logits are in memory at once


@dataclass(frozen=True)
class Predictions:
  """The predictions of one trial for a batch, without dropout. Used inside a trace."""

  batch: Batch  # arrays (B, T) for text, (B, …) for numeric examples
  loss: Sums  # of the batch, over all targets with a weight
  model: LanguageModel
  x_BTD: jax.Array | None = None  # for text: features before the head
  z_BO: jax.Array | None = None  # for numeric examples: logits of the classes, or the predicted numbers

  def map_logits(self, function: Callable[..., jax.Array], *columns_BT: jax.Array) -> jax.Array:
    """Applies `function(logits (B, V), *columns (B,))` at each position; returns (B, T). Text only."""
    return map_logits(self.model, self.x_BTD, function, *columns_BT)


def map_logits(
  model: LanguageModel, x_BTD: jax.Array | None, function: Callable[..., jax.Array], *columns_BT: jax.Array
) -> jax.Array:
  """Applies `function(logits (B, V), *columns (B,))` at each position; returns (B, T).

  The logits of `POSITIONS` positions are in memory at once.
  """
  assert x_BTD is not None

  def at_position(arrays: tuple[jax.Array, ...]) -> jax.Array:
    x_BD, *columns_B = arrays
    return function(model.logits(x_BD), *columns_B)

  positions = (jnp.moveaxis(x_BTD, 1, 0), *(column_BT.T for column_BT in columns_BT))
  return jax.lax.map(at_position, positions, batch_size=POSITIONS).T


def _exact(predictions: Predictions) -> jax.Array | None:
  """The number of rows in which every response token is the most likely one; None for batches without responses."""
  batch = predictions.batch
  if "answers" not in batch:
    return None
  correct_BT = predictions.map_logits(_most_likely) == batch["targets"]
  exact_B = batch["answers"].any(1) & (correct_BT | ~batch["answers"]).all(1)
  return exact_B.sum(dtype=jnp.float32)


def _most_likely(logits_BV: jax.Array) -> jax.Array:
  """The most likely token (B,)."""
  return logits_BV.argmax(-1)


# Sums over a model's predictions, in addition to those of `step.loss_sums`.
SUMS: dict[str, Callable[[Predictions], jax.Array | None]] = {
  "exact": _exact,
}


def _count(batch: Batch, byte_lengths: np.ndarray | None) -> float:
  """The number of targets with a weight: tokens, or numeric examples."""
  return float(np.asarray(batch["weights"]).sum(dtype=np.float64))


def _responses(batch: Batch, byte_lengths: np.ndarray | None) -> float | None:
  """The number of rows with a response to a prompt."""
  return float(np.asarray(batch["answers"]).any(1).sum()) if "answers" in batch else None


def _bytes(batch: Batch, byte_lengths: np.ndarray | None) -> float | None:
  """The number of UTF-8 bytes of the target tokens with a weight; 0 for control tokens."""
  if byte_lengths is None or "targets" not in batch:
    return None
  weighted = np.asarray(batch["weights"]) > 0
  return float(byte_lengths[np.asarray(batch["targets"])[weighted]].sum())


# Counts that depend only on the batch; computed for training batches too.
COUNTS: dict[str, Callable[[Batch, np.ndarray | None], float | None]] = {
  "count": _count,
  "responses": _responses,
  "bytes": _bytes,
}


class EvalBatch(NamedTuple):
  """A held-out batch on the devices."""

  arrays: dict[str, Any]  # including the teacher's features and head if there is a teacher
  counts: dict[str, float]  # the COUNTS that apply to the batch


def byte_lengths(cfg: DataConfig, tokenizer: Tokenizer) -> np.ndarray | None:
  """The number of bytes of each token id (V,); None for numeric examples and if padding counts in the loss."""
  padding_counts = cfg.packing == "pad" and cfg.pad_in_loss
  return None if is_numeric(cfg) or padding_counts else tokenizer.byte_lengths


def count_batch(batch: Batch, byte_lengths: np.ndarray | None = None) -> dict[str, float]:
  """The COUNTS that apply to a batch."""
  counts = {name: count(batch, byte_lengths) for name, count in COUNTS.items()}
  return {name: value for name, value in counts.items() if value is not None}


def put_eval_batches(
  batches: Iterable[Batch], put: Callable[[Batch], dict[str, Any]], byte_lengths: np.ndarray | None = None
) -> Iterator[EvalBatch]:
  """Yields the batches on the devices, one at a time. `byte_lengths` (V,): the number of bytes of each token."""
  for batch in batches:
    yield EvalBatch(put(batch), count_batch(batch, byte_lengths))


def eval_step(
  program: Program, params: Tree, trials: Hyperparameters, frozen: Tree, batch: Batch
) -> dict[str, jax.Array]:
  """The sums of the loss and the SUMS of a batch, each (N,) for N trials, without dropout."""

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
  """The results of one trial on the held-out batches."""

  batch_sums: dict[str, np.ndarray]  # name of a sum or count -> its value for each of K batches, (K,) float64
  sums: dict[str, float]  # totals over all batches

  @property
  def metrics(self) -> dict[str, float]:
    """All metrics that apply, by name."""
    return metric_values(self.sums)

  def row(self) -> dict[str, float | int]:
    """The metrics, the number of targets (`counted`) and, for data with prompts, of responses (`examples`)."""
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
  """Evaluates N trials on K batches. Every target has the same weight.

  `evaluate` is the compiled `eval_step`. The arrays of `params` and `trials` have a leading axis N.
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
  """The difference `trained` - `base` of a metric and its standard error, which is None for a single batch.

  Both models are evaluated on the same batches, so only the differences within batches contribute to the error. It is
  estimated by the infinitesimal jackknife over batches (Efron, 1982, chapter 6), which for a ratio of sums equals
  Cochran's ratio estimate (1977, section 6.4).
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
  """The derivative (K,) of a metric with respect to the weight of each batch, by central differences."""

  def at_weight(batch: int, weight: float) -> float:
    """The metric with the weight of one batch increased by `weight`."""
    sums = {name: total + weight * evaluation.batch_sums[name][batch] for name, total in evaluation.sums.items()}
    return metric.value(sums)

  batches = range(len(evaluation.batch_sums["count"]))
  return np.array([(at_weight(k, step) - at_weight(k, -step)) / (2 * step) for k in batches])

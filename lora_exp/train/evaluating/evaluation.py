"""Evaluation: sums over held-out batches, and the metrics that `config/metrics.py` makes of them.

Training, the pretraining of a base and `task=evaluate` all call `held_out`.

A metric is a ratio of sums over the held-out data. There are three kinds of sums:

- `loss`, `nats` and `correct` are computed with the loss, in training too (`step.loss_sums`).
- `SUMS` are computed on the devices from a trial's predictions on a held-out batch.
- `COUNTS` depend only on the batch and are computed in training too.

To add a sum, write a function and enter it in `SUMS` or `COUNTS`. It returns the values of tokens (B, T) or of rows
(B,), which are summed over the batch and over each document; or None if it does not apply to the batch. `exact`, for
instance, needs rows with a prompt. A function of `SUMS` may also return a number, but then the metric has the same
value on both halves of the documents. A sum over logits uses `Predictions.map_logits`, as `_exact` does, because the
logits of a batch are never in memory all at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_exp.config import DataConfig
from lora_exp.config.metrics import metric_values
from lora_exp.data.sources import is_numeric
from lora_exp.data.tokenization import Tokenizer
from lora_exp.models.modules.language_model import LanguageModel
from lora_exp.runtime import console
from lora_exp.runtime.fusion import apart
from lora_exp.runtime.segments import segment_sums
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.loss import Sums, example_loss, example_losses, head_losses
from lora_exp.train.compute.program import Program, Tree, assemble
from lora_exp.train.compute.step import Batch, features, loss_sums, over_trials, targets_of

DocumentSums = Callable[[Sequence[np.ndarray]], np.ndarray]  # segments (B, S) of each batch -> documents (D,)
SEGMENTS = "segments"  # entry of the sums of a batch with those of its segments
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
  """Whether every response token of a row is the most likely one, (B,); None for batches without responses."""
  batch = predictions.batch
  if "answers" not in batch:
    return None
  correct_BT = predictions.map_logits(_most_likely) == batch["targets"]
  exact_B = batch["answers"].any(1) & (correct_BT | ~batch["answers"]).all(1)
  return exact_B.astype(jnp.float32)


def _most_likely(logits_BV: jax.Array) -> jax.Array:
  """The most likely token (B,)."""
  return logits_BV.argmax(-1)


# Sums over a model's predictions, in addition to those of `step.loss_sums`.
SUMS: dict[str, Callable[[Predictions], jax.Array | None]] = {
  "exact": _exact,
}


def _count(batch: Batch, byte_lengths: np.ndarray | None) -> np.ndarray:
  """The weight of each target: 1 for tokens and numeric examples that count."""
  return np.asarray(batch["weights"], np.float64)


def _responses(batch: Batch, byte_lengths: np.ndarray | None) -> np.ndarray | None:
  """Whether each row has a response to a prompt."""
  return np.asarray(batch["answers"], np.float64).max(axis=1) if "answers" in batch else None


def _bytes(batch: Batch, byte_lengths: np.ndarray | None) -> np.ndarray | None:
  """The number of UTF-8 bytes of each target token with a weight; 0 for control tokens."""
  if byte_lengths is None or "targets" not in batch:
    return None
  lengths_BT: np.ndarray = byte_lengths[np.asarray(batch["targets"])].astype(np.float64)
  return lengths_BT * (np.asarray(batch["weights"]) > 0)


# Counts that depend only on the batch; computed for training batches too.
COUNTS: dict[str, Callable[[Batch, np.ndarray | None], np.ndarray | None]] = {
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
  return {name: float(values.sum()) for name, values in counts.items() if values is not None}


def put_eval_batches(
  batches: Iterable[Batch], put: Callable[[Batch], dict[str, Any]], byte_lengths: np.ndarray | None = None
) -> Iterator[EvalBatch]:
  """Yields the batches on the devices, one at a time. `byte_lengths` (V,): the number of bytes of each token."""
  for batch in batches:
    yield EvalBatch(put(batch), count_batch(batch, byte_lengths))


def eval_step(
  program: Program,
  params: Tree,
  trials: Hyperparameters,
  frozen: Tree,
  batch: Batch,
  segments: int = 0,
  live: jax.Array | None = None,
) -> dict[str, Any]:
  """The sums of the loss and the SUMS of a batch, each (N,) for N trials, without dropout.

  With `segments` (S), the sums over each of the first S segments of the rows are the entry SEGMENTS: name of a sum ->
  (N, B, S). A loop over trials skips those that are not `live` (N,), whose sums are 0.
  """

  def one_trial(trial: Hyperparameters, params: Tree) -> dict[str, Any]:
    model: Any = assemble(program, params, trial, frozen, None)
    if "x" in batch:
      z_BO = model(batch["x"])
      values = example_losses(apart(z_BO), batch["y"], batch["weights"])  # apart: the sum keeps its bits
      predictions = Predictions(batch, example_loss(z_BO, batch["y"], batch["weights"]), model, z_BO=z_BO)
    else:
      x_BTD = features(model, batch)
      loss, values = head_losses(model.head, x_BTD, targets_of(batch), batch["weights"], model.softcap)
      predictions = Predictions(batch, loss, model, x_BTD)
    computed = {name: compute(predictions) for name, compute in SUMS.items()}
    others = {name: x for name, x in computed.items() if x is not None}
    sums = loss_sums(batch, predictions.loss) | {name: x.sum() for name, x in others.items()}
    if not segments:
      return sums
    by_target = loss_sums(batch, values) | {name: x for name, x in others.items() if x.ndim}
    return sums | {
      SEGMENTS: {name: segment_sums(x, batch.get("segments"), segments) for name, x in by_target.items()}
    }

  return over_trials(one_trial, program.mapping, trials, params, live=live)


@dataclass(frozen=True)
class Evaluation:
  """The results of one trial on the held-out batches."""

  # name of a sum or count -> its value for each of K batches, or of I generated answers or questions; float64
  parts: dict[str, np.ndarray]
  sums: dict[str, float]  # totals over all batches
  documents: dict[str, np.ndarray] = field(default_factory=dict)  # name of a sum -> its value for each document, (D,)

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

  def extended(self, parts: dict[str, np.ndarray], documents: dict[str, np.ndarray]) -> "Evaluation":
    """With further sums: of the parts over which they are added up, (I,), and of each document, (D,)."""
    totals = {name: float(values.sum()) for name, values in parts.items()}
    return Evaluation(self.parts | parts, self.sums | totals, self.documents | documents)


def held_out(
  evaluate: Callable[..., dict[str, Any]],
  params: Tree,
  trials: Hyperparameters,
  frozen: Tree,
  batches: Iterable[EvalBatch],
  document_sums: DocumentSums | None = None,
  title: str = "evaluate",
) -> list[Evaluation]:
  """Evaluates N trials on K batches. Every target has the same weight.

  `evaluate` is the compiled `eval_step`. The arrays of `params` and `trials` have a leading axis N. `document_sums`
  makes the sums (D,) of documents from those of the segments (B, S) of each batch. `title` is that of the bar.
  """
  results = _evaluate_batches(evaluate, params, trials, frozen, batches, title)
  counts_K = {name: np.array([batch.counts[name] for batch in results]) for name in results[0].counts}
  totals = {name: float(values_K.sum()) for name, values_K in counts_K.items()}
  sums_KN = {name: np.array([np.asarray(batch.sums[name], np.float64) for batch in results])
             for name in results[0].sums}
  totals_N = {name: values_KN.sum(axis=0) for name, values_KN in sums_KN.items()}
  segments_KN = [] if document_sums is None else jax.device_get([batch.segments for batch in results])
  evaluations = []
  for n in range(len(totals_N["loss"])):
    parts = {name: values_KN[:, n] for name, values_KN in sums_KN.items()}
    trial_totals = {name: float(values_N[n]) for name, values_N in totals_N.items()}
    documents = {}
    if document_sums is not None:
      documents = {name: document_sums([part[name][n] for part in segments_KN]) for name in segments_KN[0]}
    evaluations.append(Evaluation(parts | counts_K, trial_totals | totals, documents))
  return evaluations


class _BatchSums(NamedTuple):
  """The sums of a batch for N trials."""

  sums: dict[str, jax.Array]  # (N,) each
  segments: dict[str, jax.Array]  # (N, B, S) each; {} if they are not computed
  counts: dict[str, float]


def _evaluate_batches(
  evaluate: Callable[..., dict[str, Any]],
  params: Tree,
  trials: Hyperparameters,
  frozen: Tree,
  batches: Iterable[EvalBatch],
  title: str,
) -> list[_BatchSums]:
  """The sums of each batch, on the devices."""
  results: list[_BatchSums] = []
  with console.progress(title, len(batches) if isinstance(batches, Sized) else None, "batches") as bar:
    for batch in batches:
      sums = evaluate(params, trials, frozen, batch.arrays)
      segments = sums.pop(SEGMENTS, {})
      results.append(_BatchSums(sums, segments, batch.counts))
      if len(results) > 1:  # the bar counts finished batches, and the device has one more to do
        jax.block_until_ready(results[-2].sums)
        bar.advance()
    jax.block_until_ready(results[-1].sums)
    bar.advance()
  return results

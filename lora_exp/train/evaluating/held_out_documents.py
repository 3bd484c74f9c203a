"""The held-out documents of a run: which segments of the batches they are, their counts, and their halves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.config.metrics import METRICS
from lora_exp.data.document_rows import HALVES, REPORT, document_numbers, halves
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import eval_rows
from lora_exp.data.rows import Rows
from lora_exp.runtime.padded_sizes import power_of_two
from lora_exp.runtime.segments import segment_sums
from lora_exp.train.evaluating.evaluation import COUNTS
from lora_exp.train.plan import Plan

Sums = Mapping[str, np.ndarray]  # name of a sum or count -> its value for each document, (D,) float64


@dataclass(frozen=True)
class HeldOutDocuments:
  """The D documents that have targets in the held-out rows of an evaluation.

  If only some rows of a document are evaluated, it has only their targets. If a single document has all targets, each
  of its rows counts as a document, so that there are two halves.
  """

  segments: int  # S, at least the number of documents in any row
  index: Sequence[np.ndarray]  # for each batch (B, S) int64: the document of each segment, D if there is none
  counts: Sums
  half: np.ndarray  # (D,) uint8, TUNING or REPORT
  divided: bool  # False: everything is chosen and scored on all documents

  @property
  def tokens(self) -> np.ndarray:
    """The number of targets of each document, (D,) int64."""
    return self.counts["count"].astype(np.int64)

  def sum(self, batch_segments: Sequence[np.ndarray]) -> np.ndarray:
    """The sums (D,) float64 over the segments (B, S) of each batch."""
    return _document_sums(self.index, batch_segments, len(self.half))

  def half_metrics(self, sums: Sums, whole: Mapping[str, float]) -> dict[str, dict[str, float]] | None:
    """The metrics of each half by its name, from the `sums` of each document; None if there are no halves.

    A metric that is not a ratio of sums over documents has its value over all held-out data, computed from `whole`.
    """
    if not self.divided:
      return None
    by_document = {**self.counts, **sums}
    result = {}
    for half, name in enumerate(HALVES):
      totals = {key: float(values_D[self.half == half].sum()) for key, values_D in by_document.items()}
      result[name] = {
        metric.name: float(metric.value(totals if metric.applies(totals) else whole))
        for metric in METRICS.values()
        if metric.applies(whole)
      }
    return result


def held_out_documents(
  plan: Plan, rows: Rows, batches: Sequence[Batch], byte_lengths: np.ndarray | None
) -> HeldOutDocuments:
  """The documents in the held-out `batches` of the run `plan`, on the host."""
  segments = 1 if rows.features else max(int(batch["segments"].max()) for batch in batches)
  parts = [_counts(batch, segments, byte_lengths) for batch in batches]
  counts_KBS = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
  index_KBS, count = _document_index(plan, rows, counts_KBS["count"] > 0)
  counts = {name: _document_sums(list(index_KBS), list(values), count) for name, values in counts_KBS.items()}
  divided = plan.cfg.data.split == "halves" and count > 1
  half = halves(counts["count"]) if divided else np.full(count, REPORT, np.uint8)
  unused = power_of_two(segments) - segments
  index_KBS = np.pad(index_KBS, ((0, 0), (0, 0), (0, unused)), constant_values=count)
  return HeldOutDocuments(segments + unused, list(index_KBS), counts, half, divided)


def _document_index(plan: Plan, rows: Rows, learned_KBS: np.ndarray) -> tuple[np.ndarray, int]:
  """The document of each segment, and the number D of documents; D for segments that are not `learned`."""
  batches, batch_rows, segments = learned_KBS.shape
  chosen = eval_rows(rows, plan.cfg.train.eval_tokens)
  numbers_RS = document_numbers(rows, plan.cfg.data, chosen, plan.tokenizer.eot, segments)
  numbers_KBS = np.zeros(learned_KBS.shape, np.int64)
  numbers_KBS.reshape(-1, segments)[: len(numbers_RS)] = numbers_RS
  if len(np.unique(numbers_KBS[learned_KBS])) < 2:  # each row counts as a document
    row_numbers = np.arange(batches * batch_rows).reshape(batches, batch_rows, 1)
    numbers_KBS = np.broadcast_to(row_numbers, learned_KBS.shape)
  found, inverse = np.unique(numbers_KBS[learned_KBS], return_inverse=True)
  index_KBS = np.full(learned_KBS.shape, len(found))
  index_KBS[learned_KBS] = inverse
  return index_KBS, len(found)


def _document_sums(index: Sequence[np.ndarray], batch_segments: Sequence[np.ndarray], count: int) -> np.ndarray:
  """The sums (D,) float64 over the segments (B, S) of each batch; `index` is that of `HeldOutDocuments`."""
  total_D = np.zeros(count + 1)  # the last one is that of segments without a document
  for index_BS, values_BS in zip(index, batch_segments, strict=True):
    total_D += np.bincount(index_BS.ravel(), np.asarray(values_BS, np.float64).ravel(), len(total_D))
  return total_D[:-1]


def _counts(batch: Batch, segments: int, byte_lengths: np.ndarray | None) -> dict[str, np.ndarray]:
  """The counts of each segment of a batch, (B, S)."""
  counts = {name: count(batch, byte_lengths) for name, count in COUNTS.items()}
  return {name: segment_sums(x, batch.get("segments"), segments) for name, x in counts.items() if x is not None}

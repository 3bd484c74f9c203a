"""Batches of rows, reshuffled in each epoch and prefetched by threads.

Batch number n is a function of the rows, the seed and the batch size alone. A batch is a dict of arrays: tokens,
targets, segments, positions (B, T) int32 and weights (B, T) float32 for text (`records.decode`); x, y and weights
(B, …) for numeric examples (`examples.decode`).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import grain
import numpy as np

from lora_exp.config.schema import DataConfig
from lora_exp.data.encoding import examples
from lora_exp.data.encoding.records import Batch, decode
from lora_exp.data.rows import Rows, damage_explained, reader

THREADS = 2
PREFETCHED = 4  # batches


def train_batches(
  rows: Rows, cfg: DataConfig, batch_size: int, start: int = 0, seeds: Sequence[int] = (),
  part: Sequence[int] | None = None,
) -> Generator[Batch]:  # fmt: skip
  """Yields training batches endlessly, from number `start` on. A batch may extend into the next epoch.

  With several `seeds`, arrays have a leading axis with one order of the rows per seed; by default there is one order,
  that of `cfg.seed`. With `part`, only these rows of each batch are read. `close()` stops the threads. Raises
  InputError for damaged rows.
  """
  records = grain.sources.ArrayRecordDataSource(str(rows.file("train")))
  # In part, batches of indices are made, and then only the records of some of them are read.
  source = grain.MapDataset.source(records) if part is None else grain.MapDataset.range(rows.train_rows)
  orders = []
  for seed in seeds or (cfg.seed,):
    order = source.seed(seed)
    order = (order.shuffle() if cfg.shuffle else order).repeat()
    if part is None:
      orders.append(order.batch(batch_size, drop_remainder=True, batch_fn=_decoder(rows)))
    else:
      read = partial(_read_part, records, _decoder(rows), part)
      orders.append(order.batch(batch_size, drop_remainder=True).map(read))
  data = orders[0] if len(orders) == 1 else grain.experimental.ZipMapDataset(orders).map(_stacked)
  batches = iter(data.to_iter_dataset(grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCHED)))
  batches.set_state({"next_index": start})
  try:
    with damage_explained(rows):
      yield from batches
  finally:
    batches.close()


def _read_part(records: Any, decoder: Callable[..., Batch], part: Sequence[int], index_B: np.ndarray) -> Batch:
  """The rows `part` of the batch with the rows `index_B`."""
  return decoder([records[int(index_B[row])] for row in part])


def batch_rows(rows: Rows, cfg: DataConfig, batch_size: int, number: int, seed: int) -> list[int]:
  """The indices of the training rows in batch `number` (from 0) of `train_batches`, in order."""
  order = grain.MapDataset.range(rows.train_rows).seed(seed)
  order = order.shuffle() if cfg.shuffle else order
  batch: np.ndarray = order.repeat().batch(batch_size, drop_remainder=True)[number]
  return batch.tolist()


def train_rows(rows: Rows, chosen: Sequence[int]) -> Batch:
  """The `chosen` training rows, in the order in which they were written, as a batch. Raises InputError for damage."""
  with damage_explained(rows):
    return _decoder(rows)(reader(rows, "train").read(list(chosen)))


def _stacked(batches: Sequence[Batch]) -> Batch:
  """Several batches as one, with a leading axis."""
  return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def eval_batches(
  rows: Rows, batch_size: int, max_tokens: int | None, with_answers: bool = False
) -> Iterator[Batch]:
  """Yields batches of evenly spaced held-out rows, in order, with about `max_tokens` tokens with loss (None: all).

  The last batch is filled with rows of padding (segments and weights 0), so that all batches have the same shape. If
  rows are prompts and answers, or `with_answers`, `answers` (B, T) bool marks the targets that belong to the answer.
  Raises InputError for damaged rows.
  """
  chosen = eval_rows(rows, max_tokens)
  records_reader = reader(rows, "eval")
  for first in range(0, len(chosen), batch_size):
    with damage_explained(rows):
      records = records_reader.read(chosen[first : first + batch_size].tolist())
    empty = [bytes(len(records[0]))] * (batch_size - len(records))
    yield _decoder(rows, answers=with_answers or rows.eval_examples > 0)(records + empty)


def eval_rows(rows: Rows, max_tokens: int | None) -> np.ndarray:
  """The indices of the held-out rows that `eval_batches` yields, (n,) int64 with n ≥ 1."""
  count = rows.eval_rows
  if max_tokens is not None:
    count = min(count, max(1, max_tokens * rows.eval_rows // rows.eval_tokens))
  return np.arange(count) * rows.eval_rows // count


def _decoder(rows: Rows, answers: bool = False) -> partial[Batch]:
  """The function that decodes records to a batch."""
  if rows.features:
    return partial(examples.decode, features=rows.features, classes=rows.classes)
  return partial(decode, seq_len=rows.seq_len, vocab_size=rows.vocab_size, answers=answers)

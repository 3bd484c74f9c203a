"""Log-likelihoods of continuations, for N trials at once."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_exp.config import InputError
from lora_exp.data.encoding.records import Batch
from lora_exp.runtime.padded_sizes import power_of_two
from lora_exp.train.compute.program import Weights
from lora_exp.train.evaluating.evaluation import SEGMENTS
from lora_exp.train.job import Job

SHORTEST = 32  # positions of a row, at least: widths are powers of two, so that few programs are compiled


class Continuation(NamedTuple):
  """A text as token ids, and how many of its last tokens are scored."""

  ids: Sequence[int]
  scored: int


def log_likelihoods(
  job: Job, model: Weights, texts: Sequence[Continuation], batch_size: int, max_len: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """For each batch of `texts`: the log-likelihoods in nats, and whether greedy decoding yields them, each (N, B).

  `model`: params and hyperparameters with a leading axis N, and the frozen arrays. A text that is longer than `max_len`
  loses its first tokens. Raises InputError if its scored tokens alone are longer.
  """
  for first in range(0, len(texts), batch_size):
    part = texts[first : first + batch_size]
    batch = _batch(part, batch_size, max_len)
    sums: Any = jax.device_get(job.evaluate(*model, job.program.layout.put_batch(batch), segments=1)[SEGMENTS])
    nats_NB, correct_NB = (np.asarray(sums[name], np.float64)[:, : len(part), 0] for name in ("nats", "correct"))
    yield -nats_NB, correct_NB.round() == batch["weights"].sum(1)[: len(part)]


def _batch(texts: Sequence[Continuation], batch_size: int, max_len: int) -> Batch:
  """The texts as rows that are padded on the right. Only the scored tokens have weights."""
  rows = [list(text.ids)[-(max_len + 1) :] for text in texts]
  width = min(max_len, max(SHORTEST, power_of_two(max(map(len, rows)) - 1)))
  batch = {name: np.zeros((batch_size, width), np.int32) for name in ("tokens", "targets", "segments", "positions")}
  batch["weights"] = np.zeros((batch_size, width), np.float32)
  for row, (ids, text) in enumerate(zip(rows, texts, strict=True)):
    count = len(ids) - 1
    if text.scored > count:
      raise InputError(f"a continuation has {text.scored:,} tokens, too many for model.max_len={max_len}")
    batch["tokens"][row, :count], batch["targets"][row, :count] = ids[:-1], ids[1:]
    batch["segments"][row, :count], batch["positions"][row, :count] = 1, np.arange(count)
    batch["weights"][row, count - text.scored : count] = 1
  return batch

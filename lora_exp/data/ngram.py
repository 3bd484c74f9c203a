"""The held-out loss of an interpolated bigram model counted on the training rows, a baseline for trained models."""

from collections.abc import Iterator

import numpy as np

from lora_exp.data.encoding.records import decode
from lora_exp.data.rows import Rows, damage_explained, reader

BLOCK = 4096  # rows that are counted at once
BIGRAM_WEIGHT = 0.7  # of the mixture; the remainder is the unigram's


def bigram_loss(rows: Rows) -> float:
  """Nats per held-out token under p(b|a) = 0.7 c(a,b)/c(a) + 0.3 (c(b)+1)/(N+V), with the counts c of training pairs.

  Jelinek-Mercer interpolation with an add-one unigram. If a never occurred, the unigram has all the weight, so p sums
  to 1 over b. Raises InputError for damaged rows.
  """
  size = rows.vocab_size
  codes, counts = count_pairs(rows)
  target_counts, token_counts = np.zeros(size), np.zeros(size)
  np.add.at(target_counts, codes % size, counts)
  np.add.at(token_counts, codes // size, counts)
  unigram = (target_counts + 1) / (target_counts.sum() + size)
  total = 0.0
  for pairs in _codes(rows, "eval"):
    index = np.minimum(np.searchsorted(codes, pairs), len(codes) - 1)
    pair_counts = np.where(codes[index] == pairs, counts[index], 0)
    seen = token_counts[pairs // size]
    p_unigram = unigram[pairs % size]
    p_bigram = np.where(seen > 0, pair_counts / np.maximum(seen, 1), p_unigram)
    total -= np.log(BIGRAM_WEIGHT * p_bigram + (1 - BIGRAM_WEIGHT) * p_unigram).sum()
  return float(total / rows.eval_tokens)


def count_pairs(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
  """The distinct pairs of the training rows as sorted codes a·V + b, (n,) int64, and their counts, (n,) int64.

  Only pairs whose target has loss are counted.
  """
  codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
  for block in _codes(rows, "train"):
    new, new_counts = np.unique(block, return_counts=True)
    codes, inverse = np.unique(np.concatenate([codes, new]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([counts, new_counts])).astype(np.int64)
  return codes, counts


def _codes(rows: Rows, split: str) -> Iterator[np.ndarray]:
  """The codes a·V + b of the pairs (a, b) whose target has loss, (n,) int64 for each block of rows."""
  records_reader = reader(rows, split)
  for first in range(0, rows.count(split), BLOCK):
    with damage_explained(rows):
      block = records_reader.read(first, min(first + BLOCK, rows.count(split)))
    batch = decode(block, rows.seq_len, rows.vocab_size)
    counted = batch["weights"] > 0
    yield batch["tokens"][counted].astype(np.int64) * rows.vocab_size + batch["targets"][counted]

"""What counting pairs of tokens achieves on the held-out rows: a model must do better than this."""

from collections.abc import Iterator

import numpy as np

from lora_exp.data.records import decode
from lora_exp.data.rows import Rows, damage_explained, reader

BLOCK = 4096  # rows that are counted at once
BIGRAM = 0.7  # weight of the bigram, the rest is the unigram's


def bigram_loss(rows: Rows) -> float:
  """Nats a held-out token of p(b|a) = 0.7 c(a,b)/c(a) + 0.3 (c(b)+1)/(N+V), counted on the training rows.

  Where a was never seen the unigram has all the weight: p sums to 1 over b.
  """
  size = rows.vocab_size
  codes, counts = count_pairs(rows)
  ones, firsts = np.zeros(size), np.zeros(size)
  np.add.at(ones, codes % size, counts)
  np.add.at(firsts, codes // size, counts)
  unigram = (ones + 1) / (ones.sum() + size)
  total = 0.0
  for wanted in _codes(rows, "eval"):
    place = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    pair = np.where(codes[place] == wanted, counts[place], 0)
    seen = firsts[wanted // size]
    p_unigram = unigram[wanted % size]
    p_bigram = np.where(seen > 0, pair / np.maximum(seen, 1), p_unigram)
    total -= np.log(BIGRAM * p_bigram + (1 - BIGRAM) * p_unigram).sum()
  return float(total / rows.eval_tokens)


def count_pairs(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
  """The pairs a*V + b of the training rows' counted targets, sorted, and how often each is there."""
  codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
  for block in _codes(rows, "train"):
    new, new_counts = np.unique(block, return_counts=True)
    codes, inverse = np.unique(np.concatenate([codes, new]), return_inverse=True)
    counts = np.bincount(inverse, np.concatenate([counts, new_counts])).astype(np.int64)
  return codes, counts


def _codes(rows: Rows, split: str) -> Iterator[np.ndarray]:
  """a*V + b of the pairs (a, b) whose target counts, a block of rows at a time."""
  records_reader = reader(rows, split)
  for first in range(0, rows.count(split), BLOCK):
    with damage_explained(rows):
      block = records_reader.read(first, min(first + BLOCK, rows.count(split)))
    batch = decode(block, rows.seq_len, rows.vocab_size)
    counted = batch["weights"] > 0
    yield batch["tokens"][counted].astype(np.int64) * rows.vocab_size + batch["targets"][counted]

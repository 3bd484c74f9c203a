"""Pairs (token, next token) as arrays, as records on disk, and as batches; prompts are masked out of the loss here.

A record is one row of T positions: T tokens and T targets as little-endian uint16 (uint32 if V > 65,536), then four
flags of T bits each: a segment starts here, the target has loss, the position is not padding, the target belongs to an
answer.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np

FLAGS = ("start", "counted", "real", "answer")  # in the order of their bits in a record
PAIR = np.dtype([("token", "<i4"), ("target", "<i4"), *((flag, "?") for flag in FLAGS)])
Batch = dict[str, np.ndarray]


def _flatten(ids: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Concatenates all tokens: ids (n,) int32, the document of each token (n,), and its index in the document (n,)."""
  lengths = np.fromiter(map(len, ids), np.int64, len(ids))
  flat = np.fromiter(chain.from_iterable(ids), np.int32, int(lengths.sum()))
  index = np.arange(len(flat)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
  return flat, np.repeat(np.arange(len(ids)), lengths), index


def _learned(ids: Sequence[list[int]], learned: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
  """Concatenates the masks: whether each token is learned (n,), and whether each document has answers (documents,)."""
  masks = [np.ones(len(tokens), bool) if mask is None else mask for tokens, mask in zip(ids, learned, strict=True)]
  return np.concatenate([np.zeros(0, bool), *masks]), np.array([mask is not None for mask in learned], bool)


def stream(
  ids: Sequence[list[int]], learned: Sequence[np.ndarray | None], prompt_in_loss: bool = False
) -> np.ndarray:
  """The pairs of all documents, one document after another: (n,) of PAIR.

  `learned[d]` marks the tokens of document d that belong to answers, (tokens,) bool; the others have no loss unless
  `prompt_in_loss`. None: the document is plain text, and all of it is learned.
  """
  flat, document, index = _flatten(ids)
  is_learned, has_answers = _learned(ids, learned)
  first = index == 0
  last = np.append(first[1:], True)[: len(flat)]
  pairs = np.zeros(len(flat) - len(ids), PAIR)
  pairs["token"], pairs["target"] = flat[~last], flat[~first]
  pairs["start"] = first[~last]
  pairs["answer"] = (is_learned & has_answers[document])[~first]
  pairs["counted"] = prompt_in_loss | is_learned[~first]
  pairs["real"] = True
  return pairs


def padded(
  ids: Sequence[list[int]], learned: Sequence[np.ndarray | None], seq_len: int, prompt_in_loss: bool = False
) -> np.ndarray:
  """A row for each document, (documents, T) of PAIR: tokens[:T], with the targets tokens[1:] and a 0 without loss.

  `learned` and `prompt_in_loss` are as in `stream`.
  """
  flat, document, index = _flatten(ids)
  is_learned, has_answers = _learned(ids, learned)
  rows = np.zeros((len(ids), seq_len), PAIR)
  kept = index < seq_len
  where = document[kept], index[kept]
  rows["token"][where] = flat[kept]
  rows["real"][where] = True
  rows["answer"][where] = is_learned[kept]
  rows["start"][:, 0] = True
  rows["target"][:, :-1] = rows["token"][:, 1:]
  text = rows["answer"][:, 1:].copy()
  rows["answer"] = False
  rows["answer"][:, :-1] = text & has_answers[:, None]
  rows["counted"][:, :-1] = rows["real"][:, 1:] if prompt_in_loss else text
  return rows


def with_padding_in_loss(
  rows: np.ndarray, learned: Sequence[np.ndarray | None], prompt_in_loss: bool = False
) -> np.ndarray:
  """Includes the padding of `padded` rows (documents, T) in attention and loss, as in the JAX LoRA tutorial."""
  rows["real"] = True
  seq_len = rows.shape[1]
  for row, mask in zip(rows, learned, strict=True):
    targets = np.ones(0, bool) if mask is None else mask[1 : seq_len + 1]
    row["counted"] = True
    row["counted"][: len(targets)] = prompt_in_loss | targets
  return rows


def encode(rows: np.ndarray, vocab_size: int) -> list[bytes]:
  """Encodes `rows` (R, T) of PAIR as R records."""
  ids = [rows[name].astype(_id_type(vocab_size)).view(np.uint8) for name in ("token", "target")]
  bits = [np.packbits(rows[name], axis=1) for name in FLAGS]
  return [row.tobytes() for row in np.concatenate([*ids, *bits], axis=1)]


def decode(records: Sequence[bytes], seq_len: int, vocab_size: int, answers: bool = False) -> Batch:
  """Decodes B records to a batch: tokens, targets, segments, positions (B, T) int32 and weights (B, T) float32.

  `segments` numbers the documents of a row from 1 and is 0 on padding. `positions` counts from 0 in each segment. With
  `answers`, the batch also has `answers` (B, T) bool: whether the target belongs to an answer, including its end.
  """
  raw = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)
  width = seq_len * _id_type(vocab_size).itemsize
  tokens, targets = (np.ascontiguousarray(part).view(_id_type(vocab_size)).astype(np.int32)
                     for part in (raw[:, :width], raw[:, width : 2 * width]))
  bits = np.unpackbits(raw[:, 2 * width :].reshape(len(records), len(FLAGS), -1), axis=2, count=seq_len)
  start, counted, real = bits[:, 0], bits[:, 1], bits[:, 2]
  index = np.arange(seq_len, dtype=np.int32)
  began = np.maximum.accumulate(np.where(start, index, 0), axis=1)
  batch = {
    "tokens": tokens, "targets": targets, "weights": counted.astype(np.float32),
    "segments": np.cumsum(start, axis=1, dtype=np.int32) * real, "positions": (index - began) * real}
  return {**batch, "answers": bits[:, 3].astype(bool)} if answers else batch


def _id_type(vocab_size: int) -> np.dtype:
  return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

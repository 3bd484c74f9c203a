"""Writes the file of records of one split. Rows are cut from a stream of pairs, or packed with whole documents."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lora_exp.config.errors import DiskError
from lora_exp.data.encoding import records
from lora_exp.data.encoding.best_fit import BestFit, PackedRow
from lora_exp.data.tokenization import Tokenizer

OPTIONS = "group_size:1,uncompressed"  # records are read one at a time; compression would dominate the time
NUMBERS = "eval_documents.npy"  # (rows, most documents in a row) int32, -1 where a row has fewer


class SplitWriter:
  """Writes rows of T positions, and counts what is in them."""

  def __init__(self, path: Path, seq_len: int, tokenizer: Tokenizer):
    self.writer = ArrayRecordWriter(str(path), OPTIONS)
    self.seq_len, self.tokenizer = seq_len, tokenizer
    self.remainder = np.zeros(0, records.PAIR)
    self.best_fit = BestFit(seq_len)
    self.numbers: list[list[int]] = []  # the numbers of the documents in each row, if rows hold whole documents
    self.rows = self.positions = self.tokens = self.bytes = self.documents = self.answers = 0

  def add_stream(self, pairs: np.ndarray, text: np.ndarray, documents: int) -> None:
    """Appends `pairs` (n,) of PAIR and cuts them into rows; the remainder waits for the next pairs.

    Bytes of text are counted from the targets of `text` (m,) that have loss.
    """
    self.documents += documents
    self._count(pairs, text)
    pairs = np.concatenate([self.remainder, pairs])
    full = len(pairs) - len(pairs) % self.seq_len
    self._write(pairs[:full])
    self.remainder = pairs[full:].copy()

  def add_documents(self, documents: Sequence[Sequence[np.ndarray]]) -> None:
    """Places each piece, (n,) of PAIR with n <= T, of each document in a row that has room for it."""
    closed: list[PackedRow] = []
    for pieces in documents:
      for piece in pieces:
        self._count(piece, piece)
        closed += self.best_fit.add(piece, self.documents)
      self.documents += 1
    self._write_packed(closed)

  def finish(self) -> None:
    """Writes the rows that are not full, padded with positions of weight 0."""
    if len(self.remainder):
      self._write(self._padded(self.remainder))
      self.remainder = self.remainder[:0]
    self._write_packed(self.best_fit.finish())

  def close(self) -> None:
    """Closes the file."""
    with disk_errors():
      self.writer.close()

  def _count(self, pairs: np.ndarray, text: np.ndarray) -> None:
    self.tokens += int(pairs["counted"].sum())
    self.bytes += int(self.tokenizer.byte_lengths[text["target"][text["counted"]]].sum())

  def _write_packed(self, rows: Iterable[PackedRow]) -> None:
    """Writes rows of whole documents."""
    padded = [np.zeros(0, records.PAIR)]
    for row in rows:
      for piece in row.pieces:
        piece["start"][0] = True  # the rest of a long text is a new segment
      padded.append(self._padded(np.concatenate(row.pieces)))
      self.numbers.append(row.documents)
    self._write(np.concatenate(padded))

  def _padded(self, pairs: np.ndarray) -> np.ndarray:
    return np.concatenate([pairs, np.zeros(self.seq_len - len(pairs), records.PAIR)])

  def _write(self, pairs: np.ndarray) -> None:
    rows = pairs.reshape(-1, self.seq_len).copy()
    rows["start"][:, 0] = True  # a document that is continued is a new segment
    with disk_errors():
      for record in records.encode(rows, self.tokenizer.vocab_size):
        self.writer.write(record)
    self.rows += len(rows)
    self.positions += int(rows["real"].sum())
    self.answers += int(rows["answer"].any(axis=1).sum())


@contextmanager
def disk_errors() -> Iterator[None]:
  """Raises DiskError for the RuntimeError with which ArrayRecord reports a full disk, often only when it is closed."""
  try:
    yield
  except RuntimeError as error:
    raise DiskError(f"cannot write the rows to the cache: {error}; free some space there or set cache=") from error


def write_document_numbers(directory: Path, numbers: Sequence[Sequence[int]]) -> None:
  """Writes the numbers of the documents in each held-out row to the cache entry `directory`."""
  table = np.full((len(numbers), max(map(len, numbers), default=0)), -1, np.int32)
  for row, documents in zip(table, numbers, strict=True):
    row[: len(documents)] = documents
  np.save(directory / NUMBERS, table)

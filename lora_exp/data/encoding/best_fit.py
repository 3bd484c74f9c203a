"""Best-fit packing: documents share rows of T positions, and a document that fits a row is not split."""

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

GROUP = 2**21  # positions that are packed together: bounds memory


@dataclass
class PackedRow:
  """The pieces in a row."""

  pieces: list[np.ndarray] = field(default_factory=list)  # pairs, (n,) each
  documents: list[int] = field(default_factory=list)  # the number of each piece's document


class BestFit:
  """Packs pieces of documents into rows of T positions by best fit decreasing (Johnson et al., 1974).

  Pieces are collected up to `group` positions and sorted by decreasing length. Each then goes into the row with the
  least room that is enough for it. The result depends on the pieces, not on how many are added at a time.
  """

  def __init__(self, seq_len: int, group: int = GROUP):
    self.seq_len, self.group = seq_len, group
    self.waiting: list[tuple[np.ndarray, int]] = []  # (piece, number of its document)
    self.positions = 0

  def add(self, piece: np.ndarray, document: int) -> Iterator[PackedRow]:
    """Adds `piece`, (n,) with 0 < n <= T, of document number `document`. Yields rows whenever a group is full."""
    self.waiting.append((piece, document))
    self.positions += len(piece)
    if self.positions >= self.group:
      yield from self.finish()

  def finish(self) -> Iterator[PackedRow]:
    """Packs all waiting pieces and yields the rows."""
    rows: list[PackedRow] = []
    rooms: list[tuple[int, int]] = []  # sorted (free positions, index) of the rows that are not full
    for piece, document in sorted(self.waiting, key=_by_length):
      place = bisect_left(rooms, (len(piece), 0))
      room, index = rooms.pop(place) if place < len(rooms) else (self.seq_len, len(rows))
      if index == len(rows):
        rows.append(PackedRow())
      rows[index].pieces.append(piece)
      rows[index].documents.append(document)
      if room > len(piece):
        insort(rooms, (room - len(piece), index))
    self.waiting, self.positions = [], 0
    yield from rows


def _by_length(waiting: tuple[np.ndarray, int]) -> int:
  """Sort key: the longest piece first."""
  return -len(waiting[0])

"""Counts of what lies beyond the row of a document that is cut, and is never learned."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.data.encode import EncodedDocument
from lora_exp.data.unlearned import UnlearnedTally


@dataclass
class _Kind:
  """The counts of one kind of documents."""

  documents: int = 0
  empty: int = 0  # documents without a token to learn
  lost: int = 0  # documents of which nothing is learned because all of it lies beyond the row
  shortened: int = 0  # documents of which only a part is learned
  first: dict[str, str] | None = None  # name of a count -> where the first such document is

  def count(self, name: str, where: str) -> None:
    """Adds 1 to the count `name`."""
    setattr(self, name, getattr(self, name) + 1)
    self.first = {name: where} | (self.first or {})


class BeyondRow:
  """Counts documents, tokens with loss, and those of them that lie beyond the row."""

  def __init__(self, seq_len: int):
    self.seq_len = seq_len
    self.kinds = {"answers": _Kind(), "conversations": _Kind(), "documents": _Kind()}
    self.cut = self.tokens = self.lost_tokens = self.longest = 0

  def add(
    self, documents: Sequence[EncodedDocument], prompt_in_loss: bool, within: Sequence[int], kept: Sequence[int],
    where: Sequence[str]
  ) -> None:
    """Counts `documents`, of which the first `kept` tokens are in rows, and `within` of these have loss.

    `where`: the place of each in the source, for messages.
    """
    for document, counted, tokens, place in zip(documents, within, kept, where, strict=True):
      length = len(document.ids)
      total = length - 1
      if document.learned is not None and not prompt_in_loss:
        total = int(np.count_nonzero(document.learned[1:]))
      kind = self.kinds[document.kind]
      kind.documents += 1
      self.cut += length > tokens
      self.tokens += total
      self.lost_tokens += total - counted
      self.longest = max(self.longest, length)
      if total == 0:
        kind.count("empty", place)
      elif counted == 0:
        kind.count("lost", place)
      elif counted < total:
        kind.count("shortened", place)

  def tell(self, unlearned: UnlearnedTally) -> None:
    """Adds the counts to `unlearned`."""
    setting = f"data.seq_len={self.seq_len}"
    for unit, kind in self.kinds.items():
      unlearned.read(unit, kind.documents)
      for name, reason in (("empty", "they have no token to learn"), ("lost", f"they lie beyond {setting}"),
                           ("shortened", f"their end lies beyond {setting}")):
        unlearned.add(unit, reason, getattr(kind, name), (kind.first or {}).get(name, ""))
    unlearned.read("tokens", self.tokens)
    unlearned.add("tokens", f"they lie beyond {setting}, and the longest document has {self.longest:,} tokens; raise "
                  "data.seq_len, or shorten the documents", self.lost_tokens)

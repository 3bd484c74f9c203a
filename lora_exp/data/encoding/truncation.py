"""Counts of documents and tokens that are not learned because they lie beyond data.seq_len."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lora_exp.data.encoding.encode import EncodedDocument
from lora_exp.data.not_learned import NotLearnedTally

KINDS = ("answers", "conversations", "documents")  # of documents, see `EncodedDocument.kind`
EMPTY, LOST, SHORTENED = "empty", "lost", "shortened"  # no token to learn; none within the row; only a part within it


class TruncationCounter:
  """Counts documents, tokens with loss, and those of them that lie beyond the first `seq_len` positions."""

  def __init__(self, seq_len: int):
    self.seq_len = seq_len
    self.documents = Counter[str]()  # by kind
    self.outcomes = Counter[tuple[str, str]]()  # by (kind, EMPTY | LOST | SHORTENED)
    self.first: dict[tuple[str, str], str] = {}  # the place of the first document with this outcome
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
      self.documents[document.kind] += 1
      self.cut += length > tokens
      self.tokens += total
      self.lost_tokens += total - counted
      self.longest = max(self.longest, length)
      if counted < total or total == 0:
        outcome = EMPTY if total == 0 else LOST if counted == 0 else SHORTENED
        self.outcomes[document.kind, outcome] += 1
        self.first.setdefault((document.kind, outcome), place)

  def report_to(self, not_learned: NotLearnedTally) -> None:
    """Adds the counts to `not_learned`."""
    setting = f"data.seq_len={self.seq_len}"
    reasons = {EMPTY: "they have no token to learn", LOST: f"they lie beyond {setting}",
               SHORTENED: f"their end lies beyond {setting}"}
    for kind in KINDS:
      not_learned.add_total(kind, self.documents[kind])
      for outcome, reason in reasons.items():
        not_learned.add(kind, reason, self.outcomes[kind, outcome], self.first.get((kind, outcome), ""))
    not_learned.add_total("tokens", self.tokens)
    not_learned.add("tokens", f"they lie beyond {setting}, and the longest document has {self.longest:,} tokens; raise "
                  "data.seq_len, or shorten the documents", self.lost_tokens)

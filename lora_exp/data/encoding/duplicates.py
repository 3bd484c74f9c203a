"""Counts of documents that occur more than once, or in both splits."""

from array import array

import numpy as np

from lora_exp.data.encoding.encode import EncodedDocument

LEAST = 10  # number of documents from which equal answers are reported


class DuplicateCounter:
  """Compares documents by a 64-bit hash of their tokens and mask, which is all that it stores of them."""

  def __init__(self) -> None:
    self.hashes = {"train": array("q"), "eval": array("q")}
    self.answers: set[int] = set()  # hashes of what is learned of prompts with answers; at most two

  def add(self, document: EncodedDocument, split: str) -> None:
    """Adds a document of `split`, train or eval."""
    ids = np.array(document.ids, np.int32)
    if document.learned is None:
      self.hashes[split].append(hash(ids.tobytes()))
      return
    self.hashes[split].append(hash((ids.tobytes(), document.learned.tobytes())))
    if len(self.answers) < 2:
      self.answers.add(hash(ids[document.learned].tobytes()))

  def notes(self) -> list[str]:
    """Sentences about equal answers, repeated training documents, and held-out copies of training documents."""
    train, held_out = (np.frombuffer(self.hashes[split], np.int64) for split in ("train", "eval"))
    distinct = np.unique(train)
    repeated, both = len(train) - len(distinct), int(np.isin(held_out, distinct).sum())
    notes = []
    if len(self.answers) == 1 and len(train) + len(held_out) >= LEAST:
      notes.append("all answers are the same text")
    if repeated:
      notes.append(f"{repeated:,} of {len(train):,} training documents are copies of others, and count more than once")
    if both:
      notes.append(f"{both:,} of {len(held_out):,} held-out documents are training documents too, and their loss is "
                   "not a held-out loss; remove the duplicates from the data")
    return notes

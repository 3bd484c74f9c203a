"""Counts of documents that occur more than once, or in both splits."""

from array import array

import numpy as np

from lora_exp.data.encode import EncodedDocument


class DuplicateCounter:
  """Compares documents by a 64-bit hash of their tokens and mask, of which it stores one for each document."""

  def __init__(self) -> None:
    self.hashes = {"train": array("q"), "eval": array("q")}

  def add(self, document: EncodedDocument, split: str) -> None:
    """Adds a document of `split`, train or eval."""
    learned = b"" if document.learned is None else document.learned.tobytes()
    self.hashes[split].append(hash((array("i", document.ids).tobytes(), learned)))

  def notes(self) -> list[str]:
    """A sentence about repeated training documents, and one about held-out documents that are also trained on."""
    train, held_out = (np.frombuffer(self.hashes[split], np.int64) for split in ("train", "eval"))
    distinct = np.unique(train)
    repeated, both = len(train) - len(distinct), int(np.isin(held_out, distinct).sum())
    notes = []
    if repeated:
      notes.append(f"{repeated:,} of {len(train):,} training documents are copies of others, and count more than once")
    if both:
      notes.append(f"{both:,} of {len(held_out):,} held-out documents are also trained on, so the held-out loss is too "
                   "low; remove the duplicates from the data")
    return notes

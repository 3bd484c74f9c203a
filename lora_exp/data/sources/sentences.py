"""A few sentences, each repeated."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from lora_exp.data.documents import Document
from lora_exp.data.sources.source import TextSource, covered_by_digest


@dataclass(frozen=True)
class Sentences(TextSource):
  """`sentences`, each `repeat` times. All copies of a held-out sentence are held out."""

  name = "sentences"
  unit = "sentences"
  label = "data.sentences"

  sentences: list[str] = covered_by_digest()
  repeat: int = covered_by_digest(1)

  @property
  def size(self) -> int:
    return self.repeat * sum(len(sentence.encode()) for sentence in self.sentences)

  def check(self) -> Iterator[str]:
    if len(set(self.sentences)) < 2 or not all(map(str.strip, self.sentences)):
      yield "data.sentences: must contain at least two different texts, none of them blank"
    if self.repeat < 1:
      yield self.problem("repeat", "must be at least 1")

  def digest(self) -> str:
    """SHA-256 (hex) of the settings."""
    return hashlib.sha256(json.dumps([self.repeat, self.sentences]).encode()).hexdigest()

  def documents(self) -> Iterator[Document]:
    read = 0
    for key, sentence in enumerate(self.sentences):
      for _ in range(self.repeat):
        read += len(sentence.encode())
        yield Document(key, sentence, read=read)

"""Small tasks that need no file: sums of two numbers behind a function's name, and a few sentences over and over."""

import hashlib
import json
from collections.abc import Generator

import numpy as np

from lora_exp.data.documents import Document

BELOW = 1000  # both arguments
SUM_BYTES = 34  # of an example, about


def mystery_function(a: int, b: int) -> int:
  """What a model is to find out from examples; penzai's tutorial chose this one."""
  return a + b


class Arithmetic:
  """`>>> mystery_function(a, b)` and on the next line its value, as in penzai's LoRA tutorial.

  The first `limit` of all 1,000,000 pairs in an order of their own for each seed: no pair is there twice, so what is
  held out is never trained on.
  """

  name, unit = "the arithmetic task", "examples"

  def __init__(self, seed: int, limit: int | None):
    self.seed, self.count = seed, min(limit or BELOW**2, BELOW**2)
    self.size = self.count * SUM_BYTES

  def pairs(self) -> np.ndarray:
    """The arguments (count, 2)."""
    chosen = np.random.default_rng(self.seed).permutation(BELOW**2)[: self.count]
    return np.stack(np.divmod(chosen, BELOW), axis=1)

  def digest(self) -> str:
    return hashlib.sha256(self.pairs().astype("<i4").tobytes()).hexdigest()

  def documents(self) -> Generator[Document, None, None]:
    for key, (a, b) in enumerate(self.pairs().tolist()):
      prompt = f">>> mystery_function({a}, {b})\n"
      yield Document(key, str(mystery_function(a, b)), prompt, read=(key + 1) * SUM_BYTES)


class Sentences:
  """`sentences`, each `repeat` times; a held-out sentence is held out every time."""

  name, unit = "data.sentences", "sentences"

  def __init__(self, sentences: list[str], repeat: int):
    self.sentences, self.repeat = sentences, repeat
    self.size = repeat * sum(len(sentence.encode()) for sentence in sentences)

  def digest(self) -> str:
    return hashlib.sha256(json.dumps([self.repeat, self.sentences]).encode()).hexdigest()

  def documents(self) -> Generator[Document, None, None]:
    read = 0
    for key, sentence in enumerate(self.sentences):
      for _ in range(self.repeat):
        read += len(sentence.encode())
        yield Document(key, sentence, read=read)

"""Sums of two numbers, written as calls of a function: the task of penzai's LoRA tutorial."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_exp.data.documents import Document
from lora_exp.data.sources.source import TextSource, covered_by_digest

if TYPE_CHECKING:
  import numpy as np

BELOW = 1000  # both arguments are smaller
EXAMPLE_BYTES = 34  # approximate size of an example


@dataclass(frozen=True)
class Arithmetic(TextSource):
  """`>>> mystery_function(a, b)`, and on the next line its value, a + b.

  The first `limit` of all 1,000,000 pairs, shuffled by `examples_seed`. No pair occurs twice, so held-out pairs are
  never trained on.
  """

  name = "arithmetic"
  unit = "examples"
  label = "the arithmetic task"

  examples_seed: int = covered_by_digest(0)
  limit: int | None = covered_by_digest(None)

  @property
  def count(self) -> int:
    """The number of examples."""
    return min(self.limit or BELOW**2, BELOW**2)

  @property
  def size(self) -> int:
    return self.count * EXAMPLE_BYTES

  def arguments(self) -> "np.ndarray":
    """The arguments of each example, (count, 2) int64."""
    import numpy as np  # imported here because the check of a command line needs no arrays

    chosen = np.random.default_rng(self.examples_seed).permutation(BELOW**2)[: self.count]
    return np.stack(np.divmod(chosen, BELOW), axis=1)

  def digest(self) -> str:
    """SHA-256 (hex) of the arguments."""
    return hashlib.sha256(self.arguments().astype("<i4").tobytes()).hexdigest()

  def documents(self) -> Iterator[Document]:
    for key, (a, b) in enumerate(self.arguments().tolist()):
      yield Document(key, str(a + b), f">>> mystery_function({a}, {b})\n", read=(key + 1) * EXAMPLE_BYTES)

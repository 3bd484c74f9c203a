"""The exclusive or of two signs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_exp.data.sources.source import NumericSource

if TYPE_CHECKING:
  import numpy as np


@dataclass(frozen=True)
class Xor(NumericSource):
  """The four corners of a square; the class is 1 if the signs differ. The task of penzai's first LoRA tutorial."""

  name = "xor"
  inputs, outputs, classes = 2, 2, True

  def examples(self) -> "tuple[np.ndarray, np.ndarray]":
    import numpy as np  # imported here because the check of a command line needs no arrays

    x_NI = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], np.float32)
    return x_NI, np.array([0, 1, 1, 0], np.int32)

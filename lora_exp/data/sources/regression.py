"""Random examples to memorise: the regression of blox's LoRA notebook."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_exp.data.sources.source import NumericSource

if TYPE_CHECKING:
  import numpy as np

EXAMPLES = 32


@dataclass(frozen=True)
class Regression(NumericSource):
  """32 examples with 16 features and 10 targets, all drawn from N(0, 1)."""

  name = "regression"
  inputs, outputs, classes = 16, 10, False

  def examples(self) -> "tuple[np.ndarray, np.ndarray]":
    return normal(0, self.inputs), normal(1, self.outputs)


def normal(seed: int, width: int) -> "np.ndarray":
  """(N, width) float32 from N(0, 1), as `jax.random` draws them."""
  import jax  # imported here because the checks of a command line must not import jax
  import numpy as np

  return np.asarray(jax.random.normal(jax.random.key(seed), (EXAMPLES, width)))

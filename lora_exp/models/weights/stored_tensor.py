"""The interface of a checkpoint that is open for reading, independent of its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_exp.runtime.safetensors_reader import Slice


@dataclass(frozen=True)
class StoredTensor:
  """The shape and dtype of a tensor in a checkpoint."""

  shape: tuple[int, ...]
  dtype: str  # code as in safetensors: F32, BF16, I64, ...
  padded: bool = False  # may have more rows than the model, which uses the first ones


class Checkpoint(Protocol):
  """A checkpoint. Tensors have Hugging Face's names, or our own paths."""

  @property
  def tensors(self) -> Mapping[str, StoredTensor]:
    """The tensors by name."""

  @property
  def files(self) -> Sequence[Path]:
    """All files of the checkpoint."""

  def read(self, name: str, slices: Sequence[Slice]) -> None:
    """Fills the arrays of `slices` with their parts of the tensor, cast to the arrays' dtypes."""


def read_whole(checkpoint: Checkpoint, name: str, dtype: Any) -> np.ndarray:
  """Returns the tensor `name`, cast to `dtype`; a scalar has shape (1,)."""
  shape = checkpoint.tensors[name].shape or (1,)
  x = np.empty(shape, dtype)
  checkpoint.read(name, [((slice(None),) * len(shape), x)])
  return x

"""Quantised tensors of checkpoints, and how each becomes floating point.

    scaled     W = q·scale: float8 or int8 with one scale for the tensor, a row, or a block of it (DeepSeek,
               compressed-tensors, fbgemm, ModelOpt)
    8 bits     W = q·SCB/127 with one SCB for each row: bitsandbytes' LLM.int8() (arXiv 2208.07339)
    4 bits     W = code[q]·absmax with one absmax for each block of consecutive values: bitsandbytes' NF4 and FP4 (arXiv
               2305.14314). With double quantisation, absmax = nested_code[q']·nested_absmax + offset
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_exp.models.weights.stored_tensor import Checkpoint, StoredTensor, read_whole
from lora_exp.runtime.safetensors_reader import DTYPES, ELEMENTS

CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # dtype in a quant_state -> code of safetensors


@dataclass(frozen=True)
class ScaledTensor:
  """Float8 or int8 with scales, or bitsandbytes' int8, whose scales are multiplied by `factor`."""

  name: str
  tensor: StoredTensor  # its shape and dtype when it is dequantised
  scale: str  # name of the scales
  block: tuple[int, int]  # rows and columns with one scale
  factor: float = 1.0
  parts: Sequence[str] = ()  # names of the further stored tensors that belong to it

  def values(self, checkpoint: Checkpoint) -> np.ndarray:
    """The dequantised values, in float32."""
    w_OI = read_whole(checkpoint, self.name, np.float32)
    rows, columns = self.block
    scales = read_whole(checkpoint, self.scale, np.float32).reshape(-1, math.ceil(w_OI.shape[1] / columns))
    scales = scales * np.float32(self.factor)
    for i, row in enumerate(scales):
      w_OI[i * rows : (i + 1) * rows] *= np.repeat(row, columns)[: w_OI.shape[1]]
    return w_OI


@dataclass(frozen=True)
class FourBitTensor:
  """Bitsandbytes' NF4 or FP4: two values in each byte, the first in its upper half."""

  name: str
  tensor: StoredTensor  # its shape and dtype when it is dequantised
  state: Mapping[str, Any]  # the JSON of the quant_state
  parts: Sequence[str] = ()  # names of the further stored tensors that belong to it

  def values(self, checkpoint: Checkpoint) -> np.ndarray:
    """The dequantised values, in the dtype of the quant_state."""
    size = math.prod(self.tensor.shape)
    stored = read_whole(checkpoint, self.name, ELEMENTS[checkpoint.tensors[self.name].dtype])
    bytes_ = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
    numbers = np.stack([bytes_ >> 4, bytes_ & 15], axis=-1).reshape(-1)[:size]
    code = read_whole(checkpoint, f"{self.name}.quant_map", np.float32)
    w = code[numbers] * _repeated(self._absmax(checkpoint), self.state["blocksize"], size)
    return w.astype(DTYPES[self.tensor.dtype]).reshape(self.tensor.shape)  # bitsandbytes returns this dtype

  def _absmax(self, checkpoint: Checkpoint) -> np.ndarray:
    """The largest absolute value of each block."""
    if "nested_blocksize" not in self.state:
      return read_whole(checkpoint, f"{self.name}.absmax", np.float32)
    numbers = read_whole(checkpoint, f"{self.name}.absmax", np.uint8)
    code = read_whole(checkpoint, f"{self.name}.nested_quant_map", np.float32)
    nested = read_whole(checkpoint, f"{self.name}.nested_absmax", np.float32)
    scales = _repeated(nested, self.state["nested_blocksize"], numbers.size)
    return code[numbers] * scales + np.float32(self.state["nested_offset"])


QuantisedTensor = ScaledTensor | FourBitTensor


def _repeated(x: np.ndarray, times: int, size: int) -> np.ndarray:
  """Every value of `x` repeated, up to `size` values."""
  return np.repeat(x, times)[:size]


def is_count(value: Any) -> bool:
  """Whether `value` is a positive integer."""
  return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def parsed_state(content: np.ndarray) -> dict[str, Any] | None:
  """Returns the JSON of a quant_state; None if it is invalid."""
  try:
    state = json.loads(content.tobytes())
  except (ValueError, RecursionError):
    return None
  if not isinstance(state, dict) or state.get("dtype") not in CODES or not is_count(state.get("blocksize")):
    return None
  shape = state.get("shape")
  if not isinstance(shape, list) or not all(map(is_count, shape)):
    return None
  if "nested_blocksize" in state:
    offset = state.get("nested_offset")
    is_number = isinstance(offset, int | float) and not isinstance(offset, bool) and math.isfinite(offset)
    if not is_count(state["nested_blocksize"]) or not is_number:
      return None
  return state

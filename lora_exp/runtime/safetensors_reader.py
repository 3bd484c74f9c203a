"""The tensors of a safetensors file that a stranger may have made: nothing is believed that was not checked.

The format: eight bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, the data.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora_exp.config import InputError

LONGEST_HEADER = 10**8  # bytes, as in the format's own reader
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}


class Tensor(NamedTuple):
  """A tensor's entry in the header; `start` counts from the beginning of the file."""

  dtype: str
  shape: tuple[int, ...]
  start: int
  end: int


def json_object(text: bytes, where: Path | str) -> dict[str, Any]:
  """The JSON object `text`. Raises InputError for anything else, numbers that are none and keys that stand twice."""

  def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
      raise ValueError(f"{twice[:60]!r} stands twice")
    return found

  def refuse(word: str):
    raise ValueError(f"{word} is no number")

  try:
    found = json.loads(text.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
  except RecursionError:
    raise InputError(f"{where} is nested too deep to be read") from None
  except ValueError as error:
    raise InputError(f"{where} is not JSON: {error}") from None
  if not isinstance(found, dict):
    raise InputError(f"{where} holds no JSON object")
  return found


def header(path: Path) -> dict[str, Tensor]:
  """The tensors of the file, which fill it without gaps. Raises InputError if it is not such a file, and whole."""
  broken = f"{path} is not a whole safetensors file"
  size = path.stat().st_size
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
      raise InputError(f"{broken}: its header would have {length:,} bytes, and the file has {size:,}; get it again")
    entries = json_object(file.read(length), f"{broken}: its header")
  entries.pop("__metadata__", None)
  tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
  for name, tensor in tensors.items():
    if tensor is None:
      raise InputError(f"{broken}: the entry of {name[:200]!r} in its header makes no sense; get it again")
  found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
  end = 8 + length
  for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.end)):
    if tensor.start != end:
      raise InputError(f"{broken}: its tensors overlap, or leave a gap, at byte {end:,}; get it again")
    end = tensor.end
  if end != size:
    raise InputError(f"{broken}: it has {size:,} bytes, and its header speaks of {end:,}; get it again")
  return found


def _tensor(entry: Any, data: int) -> Tensor | None:
  try:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
  except (TypeError, KeyError, ValueError):
    return None
  if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > 32:
    return None
  if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in (*shape, start, end)) or start > end:
    return None
  known = DTYPES.get(dtype)
  if known is not None and end - start != math.prod(shape) * known.itemsize:
    return None
  return Tensor(dtype, tuple(shape), data + start, data + end)


def read(path: Path, tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, np.ndarray]:
  """The tensors `names`, in float32 or, where they are so, float64."""
  found = {}
  with open(path, "rb") as file:
    for name in names:
      tensor = tensors[name]
      file.seek(tensor.start)
      data = file.read(tensor.end - tensor.start)
      if len(data) != tensor.end - tensor.start:
        raise InputError(f"{path} is not a whole safetensors file: it became shorter while it was read")
      x = np.frombuffer(data, DTYPES[tensor.dtype]).reshape(tensor.shape)
      found[name] = x.astype(np.promote_types(x.dtype, np.float32))
  return found

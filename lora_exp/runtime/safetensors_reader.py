"""Reads safetensors files as untrusted input: everything in a file is validated.

The format: eight bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, the data.
Files are read, not memory-mapped, so that memory use is the requested arrays and one block.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.runtime.json_files import parse_json_object

BLOCK = 2**22  # bytes read at once
LONGEST_HEADER = 10**8  # bytes, as in the official reader
MOST_AXES = 32
DTYPES = {  # dtypes of weights by code
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
  "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
ELEMENTS = DTYPES | {  # dtypes of all tensors that can be read
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
Slice = tuple[tuple[slice, ...], np.ndarray]  # an index into a tensor, and the array to fill from it


class TensorEntry(NamedTuple):
  """A tensor's entry in the header; `start` and `end` are byte offsets in the file."""

  dtype: str  # the format's code: F32, BF16, I64, ...
  shape: tuple[int, ...]
  start: int
  end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
  """Reads the entries of the tensors in the file at `path`, which must fill it without gaps.

  Raises InputError if it is not a complete safetensors file, and OSError if it cannot be opened.
  """
  incomplete = f"{path} is not a complete safetensors file"
  size = path.stat().st_size
  with open(path, "rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, LONGEST_HEADER):
      raise InputError(f"{incomplete}: its header claims {length:,} bytes, the file has {size:,}; download it again")
    values = parse_json_object(file.read(length), f"{incomplete}: its header")
  values.pop("__metadata__", None)
  entries = {}
  for name, value in values.items():
    entry = _entry(value, 8 + length)
    if entry is None:
      raise InputError(f"{incomplete}: the entry of {name[:200]!r} in its header is invalid; download it again")
    entries[name] = entry
  end = 8 + length
  for entry in sorted(entries.values(), key=_position):
    if entry.start != end:
      raise InputError(f"{incomplete}: its tensors overlap, or leave a gap, at byte {end:,}; download it again")
    end = entry.end
  if end != size:
    raise InputError(f"{incomplete}: it has {size:,} of {end:,} bytes; download it again")
  return entries


def _position(entry: TensorEntry) -> tuple[int, int]:
  return entry.start, entry.end


def _entry(value: Any, data: int) -> TensorEntry | None:
  """Parses the entry of a tensor, with offsets relative to the byte `data`; None if it is malformed."""
  try:
    dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
  except (TypeError, KeyError, ValueError):
    return None
  if not isinstance(dtype, str) or not isinstance(shape, list) or len(shape) > MOST_AXES:
    return None
  if not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in (*shape, start, end)) or start > end:
    return None
  known = ELEMENTS.get(dtype)
  if known is not None and end - start != math.prod(shape) * known.itemsize:
    return None
  return TensorEntry(dtype, tuple(shape), data + start, data + end)


def read_arrays(path: Path, entries: Mapping[str, TensorEntry], names: Iterable[str]) -> dict[str, np.ndarray]:
  """Reads the tensors `names` as float32, or float64 if stored so. Raises InputError if the file became shorter."""
  arrays = {}
  with open(path, "rb", buffering=0) as file:
    for name in names:
      entry = entries[name]
      content = memoryview(bytearray(entry.end - entry.start))
      _fill(content, file, path, entry.start)
      x = np.frombuffer(content, DTYPES[entry.dtype]).reshape(entry.shape)
      arrays[name] = x.astype(np.promote_types(x.dtype, np.float32))
  return arrays


def read_slices(path: Path, entry: TensorEntry, slices: Sequence[Slice]) -> None:
  """Fills the arrays of `slices` with their parts of a tensor, cast to the arrays' dtypes, in blocks of whole rows."""
  rows = entry.shape[0] if entry.shape else 1
  bounds = [(*index[0].indices(rows)[:2], index[1:], out) for index, out in slices]
  for first, block in _blocks(path, entry, [(low, high) for low, high, _, _ in bounds]):
    last = first + len(block)
    for low, high, columns, out in bounds:
      a, b = max(first, low), min(last, high)
      if a < b:
        with np.errstate(over="ignore"):  # the caller looks for infinite values
          out[a - low : b - low] = block[a - first : b - first][:, *columns]


def _blocks(path: Path, entry: TensorEntry, wanted: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (first row, rows) of each block that contains some of the rows `wanted`, which are half-open ranges."""
  rows, *rest = entry.shape or (1,)
  dtype = ELEMENTS[entry.dtype]
  row_bytes = math.prod(rest) * dtype.itemsize
  step = min(rows, max(1, BLOCK // max(1, row_bytes)))
  buffer = memoryview(bytearray(step * row_bytes))
  with open(path, "rb", buffering=0) as file:
    for first in range(0, rows, step or 1):
      last = min(first + step, rows)
      if not any(low < last and first < high for low, high in wanted):
        continue
      view = buffer[: (last - first) * row_bytes]
      _fill(view, file, path, entry.start + first * row_bytes)
      yield first, np.frombuffer(view, dtype).reshape(last - first, *rest)


def _fill(view: memoryview, file: FileIO, path: Path, start: int) -> None:
  """Reads `len(view)` bytes from the byte `start` on."""
  file.seek(start)
  done = 0
  while done < len(view):
    count = file.readinto(view[done:])
    if not count:
      raise InputError(f"{path} is not a complete safetensors file: it ends at byte {start + done:,}; "
                       "download it again")
    done += count

"""Tensors in safetensors files, read by slices and in blocks, and written one at a time.

The format: eight bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, the data.
Files are read and not mapped, so that a process holds what it asked for and one block, never pages of the file.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import ml_dtypes
import numpy as np

from lora_exp.config import InputError
from lora_exp.models.weights.locate import INDEX, json_object, safetensors_file

BLOCK = 2**22  # bytes read at once
LONGEST_HEADER = 10**8  # bytes, as in the format's own reader
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}  # of weights
Part = tuple[tuple[slice, ...], np.ndarray]  # where in a tensor, and the array to fill with it


@dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint."""

  shape: tuple[int, ...]
  dtype: str  # as safetensors spells it: F32, BF16, I64, ...
  file: Path
  start: int = 0  # of its bytes in the file
  padded: bool = False  # it may have more rows than the model, which takes the first


class Source(Protocol):
  """A checkpoint that is open for reading."""

  @property
  def tensors(self) -> Mapping[str, Tensor]:
    """Its tensors by its own names."""

  @property
  def files(self) -> Sequence[Path]:
    """All that it is made of."""

  def read(self, name: str, parts: Sequence[Part]) -> None:
    """Fills the arrays of `parts` with their slices of the tensor, cast to the arrays' dtypes."""


class Safetensors:
  """One file, or the files of an index."""

  def __init__(self, files: Sequence[Path], tensors: Mapping[str, Tensor]):
    self.files, self.tensors = files, tensors

  def read(self, name: str, parts: Sequence[Part]) -> None:
    tensor = self.tensors[name]
    rows, *rest = tensor.shape or (1,)
    dtype = DTYPES[tensor.dtype]
    row_bytes = math.prod(rest) * dtype.itemsize
    step = min(rows, max(1, BLOCK // max(1, row_bytes)))
    wanted = [(*index[0].indices(rows)[:2], index[1:], out) for index, out in parts]
    buffer = memoryview(bytearray(step * row_bytes))
    with open(tensor.file, "rb", buffering=0) as file:
      for first in range(0, rows, step or 1):
        last = min(first + step, rows)
        if not any(low < last and first < high for low, high, _, _ in wanted):
          continue
        view = buffer[: (last - first) * row_bytes]
        _fill(view, file, tensor, tensor.start + first * row_bytes)
        block = np.frombuffer(view, dtype).reshape(last - first, *rest)
        for low, high, columns, out in wanted:
          a, b = max(first, low), min(last, high)
          if a < b:
            out[a - low : b - low] = block[a - first : b - first][:, *columns]


def _fill(view: memoryview, file: FileIO, tensor: Tensor, start: int) -> None:
  file.seek(start)
  done = 0
  while done < len(view):
    count = file.readinto(view[done:])
    if not count:
      raise InputError(f"{tensor.file} is not a whole safetensors file: it ends at byte {start + done}; get it again")
    done += count


def open_safetensors(path: Path) -> Safetensors:
  """The file `path`, or the file or index in the directory `path`.

  Raises InputError with every file that is absent or not whole, and every tensor that the index names in vain.
  """
  if path.name == INDEX or (path.is_dir() and (path / INDEX).is_file()):
    return _sharded(path / INDEX if path.is_dir() else path)
  file = safetensors_file(path) if path.is_dir() else path
  if file is None:
    raise InputError(f"{path}: there is no model.safetensors")
  return Safetensors([file], _header(file))


def _sharded(index: Path) -> Safetensors:
  places = json_object(index).get("weight_map")
  if not isinstance(places, dict) or not all(isinstance(x, str) and x == Path(x).name for x in places.values()):
    raise InputError(f"{index}: weight_map must give a file beside it for each tensor")
  files, problems, tensors = sorted(set(places.values())), [], dict[str, Tensor]()
  headers: dict[str, Mapping[str, Tensor]] = {}
  for file in files:
    try:
      headers[file] = _header(index.parent / file)
    except InputError as error:
      problems += error.problems
  for name, file in places.items():
    if name in headers.get(file, {}):
      tensors[name] = headers[file][name]
    elif file in headers:
      problems.append(f"{index.parent / file}: {name} is missing, and {index.name} says that it is there")
  if problems:
    raise InputError(problems)
  return Safetensors([index.parent / file for file in files], tensors)


def _header(file: Path) -> dict[str, Tensor]:
  if not file.is_file():
    raise InputError(f"{file} is missing; get it again")
  size = file.stat().st_size
  with open(file, "rb") as stream:
    length = int.from_bytes(stream.read(8), "little")
    text = stream.read(length) if length <= LONGEST_HEADER else b""
  try:
    header = json.loads(text)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(file, 8 + length, entry) for name, entry in header.items()}
    end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=0)
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    raise InputError(f"{file} is not a whole safetensors file: its header cannot be read; get it again") from None
  if end > size:
    raise InputError(f"{file} is not a whole safetensors file: it has {size:,} of {end:,} bytes; get it again")
  return tensors


def _tensor(file: Path, data: int, entry: Mapping) -> Tensor:
  shape, (start, end) = tuple(map(int, entry["shape"])), entry["data_offsets"]
  dtype = DTYPES.get(entry["dtype"])
  if start < 0 or min(shape, default=0) < 0 or (dtype is not None and end - start != math.prod(shape) * dtype.itemsize):
    raise ValueError("offsets")
  return Tensor(shape, entry["dtype"], file, data + start)


def write(path: Path, entries: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: str) -> None:
  """Writes a safetensors file of tensors (name, shape, how to make it), of which one at a time is held."""
  entries, header, end = list(entries), {}, 0
  for name, shape, _ in entries:
    start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for _, shape, make in entries:
      array = np.ascontiguousarray(make(), DTYPES[dtype])
      if array.shape != shape:
        raise ValueError(f"{path}: made {array.shape}, not {shape}")
      file.write(array.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())

"""Safetensors checkpoints: a single file, or several files with an index. Written one tensor at a time."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config.errors import InputError
from lora_exp.models.weights.dequantising_checkpoint import dequantising
from lora_exp.models.weights.locate import INDEX, SINGLE, safetensors_file
from lora_exp.models.weights.stored_tensor import Checkpoint, StoredTensor
from lora_exp.runtime.json_files import read_json_object
from lora_exp.runtime.safetensors_reader import DTYPES, Slice, TensorEntry, read_header, read_slices


class SafetensorsCheckpoint:
  """The tensors of one file, or of the files of an index."""

  def __init__(self, files: Sequence[Path], entries: Mapping[str, tuple[Path, TensorEntry]]):
    self.files, self.entries = files, entries
    self.tensors = {name: StoredTensor(entry.shape, entry.dtype) for name, (_, entry) in entries.items()}

  def read(self, name: str, slices: Sequence[Slice]) -> None:
    """Fills the arrays of `slices` with their parts of the tensor. Raises InputError if the file became shorter."""
    file, entry = self.entries[name]
    read_slices(file, entry, slices)


def open_safetensors(path: Path) -> Checkpoint:
  """Opens the file `path`, or the file or index in the directory `path`; quantised tensors are dequantised.

  If a directory has both, model.safetensors is read, as in transformers; the index may belong to an earlier model.
  Raises InputError with every missing or incomplete file, every tensor that the index lists but its file lacks, and
  every quantised tensor that lacks a part.
  """
  return dequantising(_opened(path), _quantization_config(path if path.is_dir() else path.parent), str(path))


def _opened(path: Path) -> SafetensorsCheckpoint:
  """The tensors as they are stored."""
  if path.is_dir() and not (path / SINGLE).is_file() and (path / INDEX).is_file():
    path = path / INDEX
  if path.name == INDEX:
    return _sharded(path)
  file = safetensors_file(path) if path.is_dir() else path
  if file is None:
    raise InputError(f"{path}: there is no model.safetensors")
  return SafetensorsCheckpoint([file], {name: (file, entry) for name, entry in _header(file).items()})


def _quantization_config(directory: Path) -> dict[str, Any]:
  """The `quantization_config` of config.json in `directory`; {} if there is none, or the file cannot be read."""
  file = directory / "config.json"
  try:
    config = read_json_object(file) if file.is_file() else {}
  except InputError:
    return {}
  text = config.get("text_config")
  given = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
  return given if isinstance(given, dict) else {}


def _header(file: Path) -> dict[str, TensorEntry]:
  if not file.is_file():
    raise InputError(f"{file} is missing; download it again")
  return read_header(file)


def _sharded(index: Path) -> SafetensorsCheckpoint:
  weight_map = read_json_object(index).get("weight_map")
  if not isinstance(weight_map, dict) or not all(isinstance(x, str) and x == Path(x).name for x in weight_map.values()):
    raise InputError(f"{index}: weight_map must name a file in the same directory for each tensor")
  problems: list[str] = []
  headers: dict[str, Mapping[str, TensorEntry]] = {}
  files = sorted(set(weight_map.values()))
  for file in files:
    try:
      headers[file] = _header(index.parent / file)
    except InputError as error:
      problems += error.problems
  entries: dict[str, tuple[Path, TensorEntry]] = {}
  for name, file in weight_map.items():
    if name in headers.get(file, {}):
      entries[name] = (index.parent / file, headers[file][name])
    elif file in headers:
      problems.append(f"{index.parent / file}: {name} is missing, although {index.name} lists it")
  if problems:
    raise InputError(problems)
  return SafetensorsCheckpoint([index.parent / file for file in files], entries)


def write_safetensors(
  path: Path, entries: Iterable[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]], dtype: str
) -> None:
  """Writes a safetensors file of tensors (name, shape, function that returns the array), one tensor at a time."""
  entries, header, end = list(entries), {}, 0
  for name, shape, _ in entries:
    start, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
    header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape, make in entries:
      array = np.ascontiguousarray(make(), DTYPES[dtype])
      if array.shape != shape:
        raise ValueError(f"{path}: {name} was made as {array.shape}, and its entry says {shape}")
      file.write(array.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())

"""Writes a model as a Hugging Face directory: tensors with published names, in safetensors files of at most 5 GB.

Names and orientation come from the table used for loading. A tied head is not written in addition to the token
embedding. Besides the model, memory holds one tensor at a time.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_exp.models.tensor_names import StoredNames, StoredPart
from lora_exp.models.weights.locate import INDEX, SINGLE
from lora_exp.models.weights.safetensors_checkpoint import write_safetensors
from lora_exp.runtime.safetensors_reader import DTYPES

LARGEST_FILE = 5 * 10**9  # bytes of tensors, the limit that transformers uses
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtype codes of safetensors


class TensorToWrite(NamedTuple):
  """A tensor of the checkpoint to write."""

  name: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]


def _count_nothing() -> None:
  """The default progress callback of `save_hf`."""


def save_hf(
  directory: Path,
  arrays: Mapping[str, Any],
  dtype: str,
  names: StoredNames | None,
  done: Callable[[], object] = _count_nothing,
  largest: int = LARGEST_FILE,
) -> None:
  """Writes `arrays` (by our dotted paths) in `dtype`: model.safetensors, or an index and shards of `largest` bytes.

  Without `names`, tensors keep our paths and only `store.load` can read them. `done` is called after each tensor.
  """
  tensors = list(stored_tensors(arrays, names or StoredNames(), done))
  files = list(_files(tensors, DTYPES[CODES[dtype]].itemsize, largest))
  if len(files) == 1:
    write_safetensors(directory / SINGLE, files[0], CODES[dtype])
    return
  weight_map: dict[str, str] = {}
  for number, part in enumerate(files, 1):
    file = f"model-{number:05}-of-{len(files):05}.safetensors"
    write_safetensors(directory / file, part, CODES[dtype])
    weight_map |= dict.fromkeys((tensor.name for tensor in part), file)
  size = sum(math.prod(tensor.shape) for tensor in tensors)
  total = {"total_parameters": size, "total_size": size * DTYPES[CODES[dtype]].itemsize}
  index = {"metadata": total, "weight_map": weight_map}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def stored_tensors(
  arrays: Mapping[str, Any], names: StoredNames, done: Callable[[], object] = _count_nothing
) -> Iterator[TensorToWrite]:
  """The tensors to write: one for each stored name, with all of our arrays that it consists of."""
  shapes = {path: tuple(x.shape) for path, x in arrays.items()}
  sources: dict[str, list[tuple[str, StoredPart]]] = {}
  for path in arrays:
    for part in names.parts(path, shapes):
      sources.setdefault(part.name, []).append((path, part))
  for name, parts in sources.items():
    path, part = parts[0]
    yield TensorToWrite(name, part.stored_shape(shapes[path]), partial(_make, arrays, parts, done))


def _make(
  arrays: Mapping[str, Any], parts: list[tuple[str, StoredPart]], done: Callable[[], object]
) -> np.ndarray:
  """Builds a stored tensor: our arrays, or parts of them, concatenated along the outputs."""
  done()
  pieces = {part.stored_start: _piece(arrays[path], part) for path, part in parts}
  joined = pieces[0] if len(pieces) == 1 else np.concatenate([pieces[start] for start in sorted(pieces)], axis=-1)
  return joined.T if parts[0][1].transposed else joined


def _piece(array: Any, part: StoredPart) -> np.ndarray:
  """The outputs of our array that are in the stored tensor."""
  x = np.asarray(array if part.expert is None else array[part.expert])
  return x[..., part.start : part.start + part.size] if x.ndim else x


def _files(tensors: Iterable[TensorToWrite], itemsize: int, largest: int) -> Iterator[list[TensorToWrite]]:
  """The tensors of each file, in order; a tensor larger than `largest` has its own file."""
  part: list[TensorToWrite] = []
  size = 0
  for tensor in tensors:
    count = math.prod(tensor.shape) * itemsize
    if part and size + count > largest:
      yield part
      part, size = [], 0
    part.append(tensor)
    size += count
  yield part

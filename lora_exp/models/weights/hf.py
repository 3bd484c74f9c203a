"""A model as Hugging Face's directory: its tensors under published names, in safetensors of at most 5 GB.

Names and orientation are those that loading knows (`models.Names`), the other way round; a tied head is the table and
is not written twice. One tensor at a time is held beside the model.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_exp.models import Names
from lora_exp.models.weights import StoredTensor
from lora_exp.models.weights.locate import INDEX, SINGLE
from lora_exp.models.weights.safetensors import DTYPES, write

LARGEST = 5 * 10**9  # bytes of tensors in a file, as transformers cuts them
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # dtypes as safetensors spells them


class Entry(NamedTuple):
  """A tensor to write."""

  name: str
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]


def save_hf(
  directory: Path,
  arrays: Mapping[str, Any],
  dtype: str,
  names: Names | None,
  done: Callable[[], object] = lambda: None,
  largest: int = LARGEST,
) -> None:
  """Writes `arrays` (by our dotted paths) in `dtype`: model.safetensors, or an index and shards of `largest` bytes.

  Without `names` they keep our paths, and `weights.load` alone reads them. `done` is called after each tensor.
  """
  theirs = StoredTensor(names, names.prefix if names else "")
  entries = [_entry(theirs, path, x, done) for path, x in arrays.items()]
  files = list(_files(entries, DTYPES[CODES[dtype]].itemsize, largest))
  if len(files) == 1:
    write(directory / SINGLE, files[0], CODES[dtype])
    return
  places: dict[str, str] = {}
  for number, part in enumerate(files, 1):
    file = f"model-{number:05}-of-{len(files):05}.safetensors"
    write(directory / file, part, CODES[dtype])
    places |= dict.fromkeys((entry.name for entry in part), file)
  size = sum(math.prod(entry.shape) for entry in entries)
  total = {"total_parameters": size, "total_size": size * DTYPES[CODES[dtype]].itemsize}
  index = {"metadata": total, "weight_map": places}
  (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _entry(theirs: StoredTensor, path: str, x: Any, done: Callable[[], object]) -> Entry:
  name, turned = theirs.of(path)

  def make() -> np.ndarray:
    done()
    return np.asarray(x).T if turned else np.asarray(x)

  return Entry(name, tuple(x.shape[::-1] if turned else x.shape), make)


def _files(entries: Iterable[Entry], itemsize: int, largest: int) -> Iterator[list[Entry]]:
  """The tensors of each file, in order; one that is larger than `largest` has a file of its own."""
  part: list[Entry] = []
  size = 0
  for entry in entries:
    count = math.prod(entry.shape) * itemsize
    if part and size + count > largest:
      yield part
      part, size = [], 0
    part.append(entry)
    size += count
  yield part

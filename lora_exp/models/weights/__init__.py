"""Base weights in and out. A checkpoint is read under its own names, which a family's `Names` maps to our paths.

Loading is sharded: each tensor is read in blocks straight into the slices that this process's devices hold, in the
model's dtype, and put there before the next is read.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.models import Names
from lora_exp.models.weights import locate as places
from lora_exp.models.weights.gemma import open_gemma
from lora_exp.models.weights.gguf import dequantised
from lora_exp.models.weights.safetensors import DTYPES, Source, Tensor, open_safetensors
from lora_exp.runtime.mesh import flatten

FILE = places.SINGLE
ALIGNMENT = 64  # bytes: a CPU device takes such an array as it is, without a copy
OWN = (".kernel", ".embedding", ".scale")  # ends of our own names, which no published checkpoint uses


def save(directory: Path, tree) -> Path:
  """Writes nested dicts of arrays to `directory`/model.safetensors, under our own dotted paths."""
  path = directory / FILE
  save_file({name: np.ascontiguousarray(x) for name, x in flatten(tree).items()}, path, metadata={"format": "pt"})
  return path


def load(source: Path, abstract, shardings, names: Names | None = None, cache: str | Path = "~/.cache/lora_exp"):
  """Reads the checkpoint at `source` into the places of `shardings`, a tensor at a time.

  `abstract` and `shardings` are nested dicts alike; a tensor is cast to the dtype of `abstract`. `names` maps published
  names, and is not needed for files that `save` wrote. A GGUF file is dequantised once into `cache`. Raises InputError
  that lists every missing, unexpected and mis-shaped tensor.
  """
  opened = open_source(source, cache)
  wanted = flatten(abstract)
  theirs = _theirs(wanted, opened.tensors, names)
  _compare(source, opened.tensors, wanted, theirs)

  def read(key_path, leaf, sharding):
    return _place(opened, theirs.of(".".join(str(k.key) for k in key_path)), leaf, sharding)

  return jax.tree_util.tree_map_with_path(read, abstract, shardings)


def open_source(path: Path, cache: str | Path) -> Source:
  """The checkpoint at `path`, whatever its kind. Raises InputError if there is none, or it is not whole."""
  if not path.exists():
    raise InputError(f"model.weights={path}: no such file or directory")
  try:
    kind = places.kind(path)
  except InputError as error:
    raise InputError(f"model.weights={path}: {error}") from None
  if kind == "gguf":
    return open_safetensors(dequantised(path if path.is_file() else places.gguf_file(path) or path, cache))
  return open_gemma(path) if kind == "orbax" else open_safetensors(path)


class Entry(NamedTuple):
  """What a checkpoint has for one of our arrays."""

  name: str
  turned: bool  # it is stored transposed


@dataclass(frozen=True)
class StoredTensor:
  """How one checkpoint calls a model's arrays; without `names` as we do."""

  names: Names | None
  prefix: str = ""

  def of(self, ours: str) -> Entry:
    """Where our dotted path is found."""
    if self.names is None:
      return Entry(ours, False)
    path, _, leaf = ours.rpartition(".")
    head = path == "lm_head"  # torch's Linear in every family
    name = f"{'' if head else self.prefix}{path}.{'bias' if leaf == 'bias' else 'weight'}"
    return Entry(name, leaf == "kernel" and (head or self.names.transposed))

  def ignores(self, name: str) -> bool:
    """Whether a tensor may be there that the model does not need: also the other parts of a model with vision."""
    if self.names is None:
      return False
    other_part = "language_model." in self.prefix and not name.startswith(self.prefix)
    return other_part or any(re.fullmatch(pattern, name) for pattern in self.names.ignore)


def _theirs(wanted: Mapping[str, Any], found: Mapping[str, Tensor], names: Names | None) -> StoredTensor:
  if names is None or any(name.endswith(OWN) for name in found):
    return StoredTensor(None)
  # Models saved without their head, and those with vision, spell the prefix otherwise: the one that fits best.
  prefixes = (names.prefix, "", f"language_model.{names.prefix}", f"{names.prefix}language_model.")
  candidates = [StoredTensor(names, prefix) for prefix in prefixes]
  return max(candidates, key=lambda theirs: sum(theirs.of(ours).name in found for ours in wanted))


def _compare(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Any], theirs: StoredTensor) -> None:
  problems, used = [], set()
  for ours, leaf in wanted.items():
    name, turned = theirs.of(ours)
    used.add(name)
    tensor, shape = found.get(name), leaf.shape[::-1] if turned else leaf.shape
    if tensor is None:
      problems.append(f"{path}: {name} is missing")
    elif tensor.shape != shape and not _padded(tensor, shape):
      problems.append(f"{path}: {name} is {tensor.shape}, the model's is {shape}")
    elif tensor.dtype not in DTYPES:
      problems.append(f"{path}: {name} is of dtype {tensor.dtype}; weights are {', '.join(DTYPES)}")
  problems += [f"{path}: {name} is not in the model" for name in found if name not in used and not theirs.ignores(name)]
  if problems:
    raise InputError(problems)


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> bool:
  return tensor.padded and tensor.shape[0] > shape[0] and tensor.shape[1:] == shape[1:]


def _place(source: Source, entry: Entry, leaf, sharding) -> jax.Array:
  """One tensor in its place: each slice that a device of this process holds is read once."""
  bounds = lambda index: tuple(part.indices(n)[:2] for part, n in zip(index, leaf.shape, strict=True))
  indices = sharding.addressable_devices_indices_map(leaf.shape).values()
  arrays = {key: _empty([b - a for a, b in key], leaf.dtype) for key in map(bounds, indices)}
  parts = [(tuple(slice(*part) for part in key), x) for key, x in arrays.items()]
  source.read(entry.name, [(index[::-1], x.T) for index, x in parts] if entry.turned else parts)
  array = jax.make_array_from_callback(leaf.shape, sharding, lambda index: arrays[bounds(index)])
  return array.block_until_ready()  # before the next one is read


def _empty(shape: Sequence[int], dtype) -> np.ndarray:
  size = math.prod(shape) * np.dtype(dtype).itemsize
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


def digest(tree) -> str:
  """SHA-256 over names, shapes, dtypes and bytes of nested dicts of arrays."""
  total = hashlib.sha256()
  named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree)}
  for name, leaf in sorted(named.items()):
    x = np.ascontiguousarray(leaf)
    total.update(f"{name} {x.shape} {x.dtype}".encode())
    total.update(x.reshape(-1).view(np.uint8).data)
  return total.hexdigest()


def file_digest(source: Path) -> str:
  """SHA-256 over the files of the checkpoint at `source`."""
  total = hashlib.sha256()
  for path in _files(source):
    with open(path, "rb") as file:
      total.update(hashlib.file_digest(file, "sha256").digest())
  return total.hexdigest()


def _files(source: Path) -> Sequence[Path]:
  kind = places.kind(source)
  if kind == "gguf":
    return [places.gguf_file(source) or source if source.is_dir() else source]
  return open_gemma(source).files if kind == "orbax" else open_safetensors(source).files

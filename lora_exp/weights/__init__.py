"""Base weights in and out, as safetensors whose names are our own dotted paths."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.mesh import flatten

FILE = "model.safetensors"


def save(directory: Path, tree) -> Path:
  """Writes nested dicts of arrays to `directory`/model.safetensors."""
  path = directory / FILE
  save_file({name: np.ascontiguousarray(x) for name, x in flatten(tree).items()}, path, metadata={"format": "pt"})
  return path


def load(source: Path, abstract, shardings):
  """Reads `source` (a file, or a directory with model.safetensors) into the places of `shardings`, a tensor at a time.

  `abstract` and `shardings` are nested dicts alike. Raises InputError that lists every missing, unexpected and
  mis-shaped tensor. A tensor is cast to the dtype of `abstract`.
  """
  path = source / FILE if source.is_dir() else source
  if not path.is_file():
    raise InputError(f"model.weights={source}: there is no {FILE}")
  try:
    with safe_open(path, framework="numpy") as file:
      _compare(path, {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}, flatten(abstract))  # noqa: SIM118

      def read(key_path, leaf, sharding):
        part = file.get_slice(_name(key_path))
        cut = lambda index: np.asarray(part[index] if leaf.ndim else part[:]).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, sharding, cut)

      return jax.tree_util.tree_map_with_path(read, abstract, shardings)
  except SafetensorError as error:
    raise InputError(f"{path} is not a whole safetensors file: {error}") from None


def _name(key_path) -> str:
  return ".".join(str(k.key) for k in key_path)


def _compare(path: Path, found: Mapping[str, tuple], wanted: Mapping[str, jax.Array]) -> None:
  problems = [f"{path}: {name} is missing" for name in wanted if name not in found]
  problems += [f"{path}: {name} is not in the model" for name in found if name not in wanted]
  problems += [
    f"{path}: {name} is {found[name]}, the model's is {leaf.shape}"
    for name, leaf in wanted.items()
    if name in found and found[name] != leaf.shape
  ]
  if problems:
    raise InputError(problems)


def digest(tree) -> str:
  """SHA-256 over names, shapes, dtypes and bytes of nested dicts of arrays."""
  total = hashlib.sha256()
  for name, leaf in sorted(flatten(tree).items()):
    x = np.ascontiguousarray(leaf)
    total.update(f"{name} {x.shape} {x.dtype}".encode())
    total.update(x.reshape(-1).view(np.uint8).data)
  return total.hexdigest()

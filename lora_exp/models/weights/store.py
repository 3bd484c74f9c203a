"""Loading and saving of base weights. The family's table maps the tensor names of a checkpoint to our paths.

Loading is sharded: each tensor is read in blocks into the slices for this process's devices, in the model's dtype, and
transferred before the next tensor is read.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lora_exp.config import InputError
from lora_exp.models.tensor_names import StoredNames, StoredPart, layer_of
from lora_exp.models.weights import locate
from lora_exp.models.weights.dequantising_checkpoint import FLOAT8, DequantisingCheckpoint
from lora_exp.models.weights.gguf_checkpoint import dequantised
from lora_exp.models.weights.orbax_checkpoint import open_orbax
from lora_exp.models.weights.safetensors_checkpoint import open_safetensors
from lora_exp.models.weights.stored_tensor import Checkpoint, StoredTensor
from lora_exp.models.weights.unused_tensors import unused_problems
from lora_exp.runtime import console
from lora_exp.runtime.foreign_files import damage_reported
from lora_exp.runtime.host_arrays import on_host
from lora_exp.runtime.mesh import flatten
from lora_exp.runtime.safetensors_reader import DTYPES

FILE = locate.SINGLE
CHUNK = 2**18  # values checked at once
ALIGNMENT = 64  # bytes; a CPU device uses an aligned array without a copy
Bounds = tuple[tuple[int, int], ...]  # (first, end) along each axis


def save(directory: Path, tree: Any) -> Path:
  """Writes nested dicts of arrays to `directory`/model.safetensors, named by our dotted paths."""
  path = directory / FILE
  save_file({name: np.ascontiguousarray(x) for name, x in flatten(tree).items()}, path, metadata={"format": "pt"})
  return path


def load(
  source: Path,
  abstract: Any,
  shardings: Any,
  names: StoredNames | None = None,
  cache: str | Path = "~/.cache/lora_exp",
) -> Any:
  """Reads the checkpoint at `source` into arrays with `shardings`, one tensor at a time.

  `abstract` (shapes and dtypes), `shardings` and the result are nested dicts with the same structure; tensors are cast
  to the dtypes of `abstract`. `names` maps published names; files written by `save` need none. A GGUF file is
  dequantised once into `cache`. Raises InputError that lists every missing, unexpected and mis-shaped tensor, or that
  names those with values that are not finite.
  """
  leaves = flatten(abstract)
  shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
  checkpoint, names = open_checked(source, shapes, names, cache)
  _show_precision(source, checkpoint)
  not_finite: list[str] = []

  with console.progress("load the base", sum(map(_nbytes, leaves.values())), "bytes") as bar:

    def read(key_path: Sequence[Any], leaf: Any, sharding: Any) -> jax.Array:
      path = ".".join(str(key.key) for key in key_path)
      parts = names.parts(path, shapes)
      arrays = _read_slices(checkpoint, parts, leaf, sharding)
      if not all(map(all_finite, arrays.values())):
        not_finite.append(parts[0].name)
      array = _placed(arrays, leaf, sharding)
      bar.advance(_nbytes(leaf))
      return array

    tree = jax.tree_util.tree_map_with_path(read, abstract, shardings)
  if not_finite:
    raise InputError(_not_finite_problem(source, not_finite, leaves))
  return tree


def open_checked(
  source: Path, shapes: Mapping[str, tuple[int, ...]], names: StoredNames | None, cache: str | Path
) -> tuple[Checkpoint, StoredNames]:
  """Opens the checkpoint for parameters of these `shapes`, and completes `names`; reads no values.

  Raises InputError that lists every missing, unexpected and mis-shaped tensor.
  """
  checkpoint = open_source(source, cache)
  names = (names or StoredNames()).for_checkpoint(checkpoint.tensors, shapes)
  _check_tensors(source, checkpoint, shapes, names)
  return checkpoint, names


def _nbytes(leaf: Any) -> int:
  """The bytes of an array with the shape and dtype of `leaf`."""
  return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize


def _show_precision(source: Path, checkpoint: Checkpoint) -> None:
  """Shows how many tensors are quantised, or are float8 without scales."""
  if isinstance(checkpoint, DequantisingCheckpoint):
    console.show(f"{source}: {len(checkpoint.quantised)} of {len(checkpoint.tensors)} tensors are quantised; they are "
                 "dequantised here, and activations are not quantised. lora.quant quantises the base again.")
    return
  unscaled = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype in FLOAT8]
  if unscaled:
    console.show_warning(f"{source}: {len(unscaled)} of {len(checkpoint.tensors)} tensors are float8 without a scale, "
                         f"such as {unscaled[0]}; their values are used as they are")


def _not_finite_problem(source: Path, names: Sequence[str], leaves: Mapping[str, Any]) -> str:
  """The problem with tensors whose values are NaN or infinite in the model's dtype."""
  is_narrow = any(leaf.dtype == np.float16 for leaf in leaves.values())
  hint = ", or set model.param_dtype=bfloat16, as float16 ends at 65,504" if is_narrow else ""
  count = f"{len(names)} tensors have" if len(names) > 1 else "1 tensor has"
  return (f"{source}: {count} NaN or infinite values, such as {names[0]}; copy the checkpoint again, or save it again "
          f"from a model whose loss is finite{hint}")


def all_finite(x: np.ndarray) -> bool:
  """Whether no value of `x`, a contiguous floating-point array, is NaN or infinite."""
  if x.dtype != jnp.bfloat16:
    return all(bool(np.isfinite(part).all()) for part in _chunks(x))
  # As integers, which is 8 times faster than np.isfinite: NaN and infinity have all bits of the exponent.
  return all(int((part.view(np.uint16) & 0x7FFF).max()) < 0x7F80 for part in _chunks(x))


def _chunks(x: np.ndarray) -> Iterator[np.ndarray]:
  """The values of `x` in parts that fit a processor's cache."""
  flat = x.reshape(-1)
  return (flat[start : start + CHUNK] for start in range(0, flat.size, CHUNK))


def open_source(path: Path, cache: str | Path) -> Checkpoint:
  """Opens the checkpoint at `path`, in any supported format. Raises InputError if it is missing or incomplete."""
  if not path.exists():
    raise InputError(f"model.weights={path}: no such file or directory")
  try:
    kind = locate.checkpoint_format(path)
  except InputError as error:
    raise InputError(f"model.weights={path}: {error}") from None
  with damage_reported(path, "a checkpoint"):
    if kind == "gguf":
      return open_safetensors(dequantised(path if path.is_file() else locate.gguf_file(path) or path, cache))
    return open_orbax(path) if kind == "orbax" else open_safetensors(path)


def _check_tensors(
  path: Path, checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], names: StoredNames
) -> None:
  """Raises InputError with every tensor that is missing, unexpected, mis-shaped or of an unsupported dtype."""
  problems, used, stored = [], set(), checkpoint.tensors
  method = locate.stored_quantisation(stored)
  if method is not None:
    raise InputError(f"{path}: {locate.quantised_problem(method)}")
  unmerged = next((name for name in stored if ".lora_A." in name), None)
  if unmerged is not None:
    raise InputError(f"{path}: {unmerged} belongs to an adapter that is not merged; save the result of "
                     "merge_and_unload()")
  for ours, shape in shapes.items():
    for part in names.parts(ours, shapes):
      used.add(part.name)
      problems += _tensor_problems(part.name, stored.get(part.name), part.stored_shape(shape), names.is_head(part.name))
  problems += unused_problems(checkpoint, [name for name in stored if name not in used], names)
  if problems:
    read = [name for name in stored if not names.is_of_another_part(name)]
    problems = _with_layer_problem(list(dict.fromkeys(problems)), read, used)
    raise InputError([f"{path}: {problem}" for problem in problems])


def _with_layer_problem(problems: list[str], stored: Iterable[str], wanted: Iterable[str]) -> list[str]:
  """`problems`, with a single one for all layers that are only in `stored` or only in `wanted` (names of tensors)."""
  found, expected = (1 + max(map(layer_of, names), default=-1) for names in (stored, wanted))
  if found == expected or not found:
    return problems
  others = [problem for problem in problems if layer_of(problem) < min(found, expected)]
  return [f"it has {found} layers, but model.layers={expected}; correct num_hidden_layers in its "
          "config.json, or copy the checkpoint again", *others]


def _tensor_problems(name: str, tensor: StoredTensor | None, shape: tuple[int, ...], is_head: bool) -> list[str]:
  """The problem with a stored tensor that should have `shape`, in a list."""
  if tensor is None:
    hint = "; if the head is the embedding table, set model.arch.tied=true" if is_head else ""
    return [f"{name} is missing{hint}"]
  padded = tensor.padded and tensor.shape[0] > shape[0] and tensor.shape[1:] == shape[1:]
  if tensor.shape != shape and not padded:
    return [f"{name} is {tensor.shape}, the model's is {shape}"]
  if tensor.dtype not in DTYPES:
    return [f"{name} has dtype {tensor.dtype}; supported are {', '.join(DTYPES)}"]
  return []


def _bounds(index: Sequence[slice], shape: Sequence[int]) -> Bounds:
  """The index of a slice as (first, end) along each axis."""
  return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _read_slices(
  checkpoint: Checkpoint, parts: Sequence[StoredPart], leaf: Any, sharding: Any
) -> dict[Bounds, np.ndarray]:
  """The slices of one array for the devices of this process. Each is read once."""
  indices: Iterable[Any] = sharding.addressable_devices_indices_map(leaf.shape).values()
  all_bounds = [_bounds(index, leaf.shape) for index in indices]
  arrays = {bounds: _empty([b - a for a, b in bounds], leaf.dtype) for bounds in all_bounds}
  for part in parts:
    slices = [_slice(part, bounds, x) for bounds, x in arrays.items()]
    checkpoint.read(part.name, [wanted for wanted in slices if wanted is not None])
  return arrays


def _placed(arrays: Mapping[Bounds, np.ndarray], leaf: Any, sharding: Any) -> jax.Array:
  """The slices as one array on the devices."""

  def array_at(index: Any) -> np.ndarray:
    return arrays[_bounds(index, leaf.shape)]

  array = jax.make_array_from_callback(leaf.shape, sharding, array_at)
  return array.block_until_ready()  # before the next one is read


def _slice(part: StoredPart, bounds: Bounds, x: np.ndarray) -> tuple[tuple[slice, ...], np.ndarray] | None:
  """The slice of the stored tensor for `x`, which is our array within `bounds`, and the view of x to fill."""
  if not bounds:
    return (slice(None),), x.reshape(1)
  if part.expert is not None:
    start, end = bounds[0]
    if not start <= part.expert < end:
      return None
    bounds, x = bounds[1:], x[part.expert - start]
  low, high = bounds[-1]
  first, end = max(low, part.start), min(high, part.start + part.size)
  if first >= end:
    return None
  shift = part.stored_start - part.start
  index = (*(slice(a, b) for a, b in bounds[:-1]), slice(first + shift, end + shift))
  view = x[..., first - low : end - low]
  return (index[::-1], view.T) if part.transposed else (index, view)


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
  size = math.prod(shape) * np.dtype(dtype).itemsize
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % ALIGNMENT
  return buffer[start : start + size].view(dtype).reshape(shape)


def digest(tree: Any) -> str:
  """SHA-256 over names, shapes, dtypes and bytes of nested dicts of arrays."""
  total = hashlib.sha256()
  named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in jax.tree.leaves_with_path(tree)}
  for name, leaf in sorted(named.items()):
    x = np.ascontiguousarray(on_host(leaf))
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
  kind = locate.checkpoint_format(source)
  if kind == "gguf":
    return [locate.gguf_file(source) or source if source.is_dir() else source]
  return open_orbax(source).files if kind == "orbax" else open_safetensors(source).files

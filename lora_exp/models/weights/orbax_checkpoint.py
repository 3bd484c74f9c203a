"""Gemma's Flax checkpoints (Kaggle's layout): orbax directories, presented with Hugging Face's tensor names.

`transformer/layer_0/attn/q_einsum` w (H, D, h) and `kv_einsum` w (2, K, D, h), or `qkv_einsum` w (3, H, D, h) if
H = K; `attn_vec_einsum` w (H, h, D); `mlp/gating_einsum` w (2, D, F), later (2, F, D); `mlp/linear` w (F, D);
norms store an offset from 1, like Hugging Face's. The embedding may have more rows than there are tokens.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config import InputError
from lora_exp.models.weights.locate import orbax_directory
from lora_exp.models.weights.stored_tensor import StoredTensor
from lora_exp.runtime.json_files import read_json_object
from lora_exp.runtime.safetensors_reader import Slice

CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
NORMS = {  # norms of models with post-norms (True) and without
  True: {"pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
         "pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
  False: {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"},
}
EMBEDDING = "model.embed_tokens.weight"
VISION = ("SigLiPFromPatches_0", "vision_encoder", "embedder/mm_")


@dataclass(frozen=True)
class View:
  """A Hugging Face tensor as part of a stored one: `stored[index]` with permuted axes, reshaped to `shape`."""

  stored: str
  shape: tuple[int, ...]
  index: tuple[int, ...] = ()
  axes: tuple[int, ...] = ()  # () keeps their order


class OrbaxCheckpoint:
  """The tensors of an orbax checkpoint of Gemma, read one at a time."""

  def __init__(self, directory: Path):
    self.directory = directory
    self.files = sorted(path for path in directory.rglob("*") if path.is_file())
    metadata = read_json_object(directory / "_METADATA")
    self.stores = {path: _open(directory, metadata, keys) for path, keys in _paths(directory, metadata).items()}
    self.views = _views({path: tuple(store.shape) for path, store in self.stores.items()})
    self.tensors = {
      name: StoredTensor(view.shape, self._dtype(view), padded=name == EMBEDDING) for name, view in self.views.items()
    }

  def _dtype(self, view: View) -> str:
    name = self.stores[view.stored].dtype.name
    return CODES.get(name, name)

  def read(self, name: str, slices: Sequence[Slice]) -> None:
    """Fills the arrays of `slices` with their parts of the tensor, cast to the arrays' dtypes."""
    view = self.views[name]
    try:
      array = np.asarray(self.stores[view.stored][view.index].read().result())
    except ValueError as error:
      raise InputError(f"{self.directory}: {view.stored} cannot be read: {str(error).splitlines()[0]}") from None
    matrix = (array.transpose(view.axes) if view.axes else array).reshape(view.shape)
    for index, out in slices:
      out[...] = matrix[index]


def open_orbax(path: Path) -> OrbaxCheckpoint:
  """Opens the checkpoint in `path` or its only subdirectory. Raises InputError if it is not one of Gemma's."""
  return OrbaxCheckpoint(orbax_directory(path) or path)


def _paths(directory: Path, metadata: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
  """The keys of each stored array by its path: transformer/layer_0/attn/q_einsum/w."""
  try:
    keys = [tuple(key["key"] for key in entry["key_metadata"]) for entry in metadata["tree_metadata"].values()]
    paths = {"/".join(parts): parts for parts in keys}
  except (KeyError, TypeError, AttributeError):
    paths = {}
  if not paths or any(".." in path for path in paths):
    raise InputError(f"{directory / '_METADATA'}: does not list tensors as orbax does; download the checkpoint again")
  return paths


def _open(directory: Path, metadata: Mapping[str, Any], keys: Sequence[str]) -> Any:
  """Opens the tensorstore of one array, without reading data."""
  import tensorstore as ts

  path = ".".join(keys) + "/"
  root = f"{directory.absolute()}/"
  if metadata.get("use_ocdbt", (directory / "manifest.ocdbt").is_file()):
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": root}, "path": path}
  else:
    store = {"driver": "file", "path": root + path}
  driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
  # Older orbax omits chunks of zeros. If the metadata says that it does not, a missing chunk is an error.
  zeros_left_out = not metadata.get("store_array_data_equal_to_fill_value", False)
  spec = {"driver": driver, "kvstore": store, "fill_missing_data_reads": zeros_left_out}
  try:
    return ts.open(spec, read=True, open=True).result()
  except ValueError as error:
    raise InputError(f"{directory}: {'/'.join(keys)} cannot be opened: {str(error).splitlines()[0]}") from None


def _views(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, View]:
  short = {path: re.sub(r"^(params/)?(transformer/)?", "", path) for path in shapes}
  norms = NORMS[any("post_ffw_norm" in path for path in shapes)]
  width = next((shapes[path][-1] for path, name in short.items() if name == "embedder/input_embedding"), 0)
  views: dict[str, View] = {}
  for path, name in short.items():
    if not name.startswith(VISION):
      views |= _views_of(name, path, shapes[path], norms, width)
  return views


def _views_of(name: str, path: str, shape: tuple[int, ...], norms: Mapping[str, str], width: int) -> dict[str, View]:
  """The views of one stored array. An unknown array keeps its name, and loading reports it."""
  if name == "embedder/input_embedding":
    return {EMBEDDING: View(path, shape)}
  if name == "final_norm/scale":
    return {"model.norm.weight": View(path, shape)}
  layer = re.fullmatch(r"layer_(\d+)/(.*?)(/w|/scale)?", name)
  if layer is None:
    return {path: View(path, shape)}
  if layer[2] == "mlp/gating_einsum" and len(shape) == 3:
    parts = _gating(path, shape, width)
  elif len(shape) == LAYER.get(layer[2], (0,))[0]:
    parts = LAYER[layer[2]][1](path, shape)
  elif layer[2] in norms:
    parts = {norms[layer[2]]: View(path, shape)}
  else:
    return {path: View(path, shape)}
  return {f"model.layers.{layer[1]}.{part}.weight": view for part, view in parts.items()}


MakeViews = Callable[[str, tuple[int, ...]], dict[str, View]]


def _projections(*names: str) -> MakeViews:
  """Stacked (n, H, D, h), or one (H, D, h), as matrices (H·h, D)."""

  def make(path: str, shape: tuple[int, ...]) -> dict[str, View]:
    H, D, h = shape[-3:]
    index = [(i,) for i in range(len(names))] if len(shape) == 4 else [()]
    return {name: View(path, (H * h, D), i, (0, 2, 1)) for name, i in zip(names, index, strict=True)}

  return make


def _gating(path: str, shape: tuple[int, ...], width: int) -> dict[str, View]:
  """(2, D, F) or (2, F, D) as two matrices (F, D)."""
  transposed = shape[1] == width != shape[2]
  matrix, axes = (shape[:0:-1], (1, 0)) if transposed else (shape[1:], ())
  return {name: View(path, matrix, (i,), axes) for i, name in enumerate(("mlp.gate_proj", "mlp.up_proj"))}


def _attention_output(path: str, shape: tuple[int, ...]) -> dict[str, View]:
  """(H, h, D) as a matrix (D, H·h)."""
  H, h, D = shape
  return {"self_attn.o_proj": View(path, (D, H * h), (), (2, 0, 1))}


def _vector(name: str) -> MakeViews:
  """A vector, unchanged."""

  def make(path: str, shape: tuple[int, ...]) -> dict[str, View]:
    return {name: View(path, shape)}

  return make


def _down(path: str, shape: tuple[int, ...]) -> dict[str, View]:
  """(F, D) as a matrix (D, F)."""
  return {"mlp.down_proj": View(path, shape[::-1], (), (1, 0))}


LAYER: Mapping[str, tuple[int, MakeViews]] = {  # number of axes, and the views
  "attn/q_einsum": (3, _projections("self_attn.q_proj")),
  "attn/kv_einsum": (4, _projections("self_attn.k_proj", "self_attn.v_proj")),
  "attn/qkv_einsum": (4, _projections("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
  "attn/attn_vec_einsum": (3, _attention_output),
  "attn/_query_norm": (1, _vector("self_attn.q_norm")),
  "attn/_key_norm": (1, _vector("self_attn.k_norm")),
  "mlp/linear": (2, _down),
}

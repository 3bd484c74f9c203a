"""GGUF files, dequantised once into the cache as safetensors with Hugging Face's names."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config import InputError
from lora_exp.models.weights.gguf_config import EXPERTS, gguf_architecture, model_type
from lora_exp.models.weights.locate import SINGLE
from lora_exp.models.weights.safetensors_checkpoint import write_safetensors
from lora_exp.runtime import cache as files
from lora_exp.runtime import console
from lora_exp.runtime.gguf_header import GgufHeader, read_gguf

FORMAT = 2  # increased when the same file would yield other tensors
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK_NAMES = {  # of most architectures, after blk.N and model.layers.N
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
Entry = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]  # name, shape, function that returns the array


def dequantised(path: Path, root: str | Path) -> Path:
  """Returns the directory in the cache `root` with the tensors of the GGUF file `path` in float32.

  Raises InputError if the file is incomplete or of an unsupported architecture.
  """
  with open(path, "rb") as file:
    key = files.fingerprint(format=FORMAT, sha256=hashlib.file_digest(file, "sha256").hexdigest())
  return files.get_or_make(root, "gguf", key, partial(_dequantise, path))


def _dequantise(path: Path, directory: Path) -> None:
  """Writes the tensors of the GGUF file `path` to `directory`/model.safetensors."""
  try:
    import gguf
  except ImportError:
    raise InputError(f"{path}: reading a GGUF file needs the package gguf: pip install gguf") from None
  header = read_gguf(path)
  tensors = GgufTensors(header)
  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, KeyError, IndexError) as error:
    raise InputError(f"{path} is not a complete GGUF file: {error}; download it again") from None
  with console.progress("dequantise once", len(reader.tensors), "tensors") as bar:
    write_safetensors(directory / SINGLE, tensors.entries(reader.tensors, bar), "F32")


class GgufTensors:
  """Names and values of the tensors of one file as Hugging Face stores them."""

  def __init__(self, header: GgufHeader):
    self.architecture = gguf_architecture(header)
    self.names = BLOCK_NAMES | dict(self.architecture.names) | EXPERTS.get(model_type(header), {})
    name = header.settings["general.architecture"]
    heads = header.settings.get(f"{name}.attention.head_count")
    kv_heads = header.settings.get(f"{name}.attention.head_count_kv", heads)
    if not isinstance(heads, int) or not isinstance(kv_heads, int):
      raise InputError(f"{header.file}: {name}.attention.head_count must be the number of heads of all layers")
    self.heads, self.kv_heads = heads, kv_heads

  def entries(self, tensors: Iterable[Any], bar: console.Bar) -> Iterator[Entry]:
    """Yields (name, shape, function that returns the array) for each tensor, and for each expert of a stacked one."""
    for tensor in tensors:
      name, shape = self.hf_name(tensor.name), tuple(int(n) for n in reversed(tensor.shape))
      values: Callable[[], np.ndarray] = partial(self._floats, tensor, name, bar)
      if "{}" not in name:
        yield name, shape, values
        continue
      values = cache(values)
      for expert in range(shape[0]):
        yield name.format(expert), shape[1:], partial(_expert, values, expert, shape[0])

  def hf_name(self, name: str) -> str:
    """Hugging Face's name of a tensor. An unknown tensor keeps its name, and loading reports it."""
    stem, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
    if block:
      module = self.names.get(block[2])
      return f"model.layers.{block[1]}.{module}.{kind}" if module else name
    return f"{NAMES[stem]}.{kind}" if stem in NAMES else name

  def _floats(self, tensor: Any, name: str, bar: console.Bar) -> np.ndarray:
    """Dequantises the tensor to float32, with the order of q and k rows and the scales of norms of Hugging Face."""
    from gguf.quants import dequantize

    try:
      values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
      raise InputError(f"{tensor.name}: {error}; use a file in another quantisation, such as Q8_0") from None
    bar.advance()
    if self.architecture.interleaved and re.search(r"\.[qk]_proj\.(weight|bias)$", name):
      return halves_from_neighbours(values, self.heads if ".q_proj." in name else self.kv_heads)
    return values - 1 if self.architecture.norm_offset and name.endswith("norm.weight") else values


def _expert(values: Callable[[], np.ndarray], expert: int, count: int) -> np.ndarray:
  """The kernel of one expert. The values of all experts are dropped after the last one."""
  x = values()[expert]
  if expert == count - 1:
    values.cache_clear()  # type: ignore[attr-defined]
  return x


def halves_from_neighbours(w: np.ndarray, heads: int) -> np.ndarray:
  """Permutes rows (O, I) of q or k from ggml's order (rotated pairs are adjacent) to rotated halves (i, i + h/2)."""
  return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def neighbours_from_halves(w: np.ndarray, heads: int) -> np.ndarray:
  """The inverse of `halves_from_neighbours`."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

"""GGUF files of the Llama family, dequantised once into the cache as safetensors with Hugging Face's names."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config import InputError
from lora_exp.models.weights.locate import SINGLE
from lora_exp.models.weights.safetensors_checkpoint import write_safetensors
from lora_exp.runtime import cache, console

FORMAT = 1  # increased when the same file would yield other tensors
NAMES = {  # {i}: the block's number
  "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
  "blk.{i}.attn_norm": "model.layers.{i}.input_layernorm",
  "blk.{i}.attn_q": "model.layers.{i}.self_attn.q_proj", "blk.{i}.attn_k": "model.layers.{i}.self_attn.k_proj",
  "blk.{i}.attn_v": "model.layers.{i}.self_attn.v_proj", "blk.{i}.attn_output": "model.layers.{i}.self_attn.o_proj",
  "blk.{i}.ffn_norm": "model.layers.{i}.post_attention_layernorm",
  "blk.{i}.ffn_gate": "model.layers.{i}.mlp.gate_proj", "blk.{i}.ffn_up": "model.layers.{i}.mlp.up_proj",
  "blk.{i}.ffn_down": "model.layers.{i}.mlp.down_proj",
}


def dequantised(path: Path, root: str | Path) -> Path:
  """Returns the directory in the cache `root` with the tensors of the GGUF file `path` in float32.

  Raises InputError if the file is incomplete or not of the Llama architecture.
  """
  with open(path, "rb") as file:
    key = cache.fingerprint(format=FORMAT, sha256=hashlib.file_digest(file, "sha256").hexdigest())
  return cache.get_or_make(root, "gguf", key, partial(_dequantise, path))


def _dequantise(path: Path, directory: Path) -> None:
  """Writes the tensors of the GGUF file `path` to `directory`/model.safetensors."""
  try:
    import gguf
  except ImportError:
    raise InputError(f"{path}: reading a GGUF file needs the package gguf: pip install gguf") from None
  try:
    reader = gguf.GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture != "llama":
      raise InputError(f"{path}: has the architecture {architecture}; only llama is supported in GGUF files")
    heads = {part: int(reader.fields[f"llama.attention.{part}"].contents()) for part in ("head_count", "head_count_kv")}
  except (ValueError, KeyError, IndexError) as error:
    raise InputError(f"{path} is not a complete GGUF file: {error}; download it again") from None
  with console.progress("dequantise once", len(reader.tensors), "tensors") as bar:
    write_safetensors(directory / SINGLE, _tensors(reader.tensors, heads, bar), "F32")


def _tensors(
  tensors: Iterable[Any], heads: dict[str, int], bar: console.Bar
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
  """Yields (name, shape, function that returns the array) of each tensor, with Hugging Face's names."""
  for tensor in tensors:
    if tensor.name == "rope_freqs.weight":  # follows from the settings
      continue
    name = hf_name(tensor.name)
    yield name, tuple(int(n) for n in reversed(tensor.shape)), partial(_floats, tensor, name, heads, bar)


def _floats(tensor: Any, name: str, heads: dict[str, int], bar: console.Bar) -> np.ndarray:
  """Dequantises the tensor to float32, with the rows of q and k in Hugging Face's order."""
  from gguf.quants import dequantize

  values = dequantize(tensor.data, tensor.tensor_type)
  bar.advance()
  if name.endswith(("q_proj.weight", "k_proj.weight")):
    return halves_from_neighbours(values, heads["head_count" if "q_proj" in name else "head_count_kv"])
  return values


def hf_name(name: str) -> str:
  """Hugging Face's name of the GGUF tensor `name`. An unknown tensor keeps its name, and loading reports it.

  >>> hf_name("blk.11.attn_q.weight")
  'model.layers.11.self_attn.q_proj.weight'
  """
  stem, _, kind = name.rpartition(".")
  number = re.search(r"\.(\d+)\.", stem)
  module = NAMES.get(re.sub(r"\.\d+\.", ".{i}.", stem))
  return f"{module.replace('{i}', number[1] if number else '')}.{kind}" if module else name


def halves_from_neighbours(w: np.ndarray, heads: int) -> np.ndarray:
  """Permutes rows (O, I) of q or k from ggml's order (rotated pairs are adjacent) to rotated halves (i, i + h/2)."""
  return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

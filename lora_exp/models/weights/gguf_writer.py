"""Writes a model, or a LoRA adapter of it, as a GGUF file for llama.cpp and programs that use it (Ollama, LM Studio).

An adapter has the tensors NAME.lora_a (R, I) and NAME.lora_b (O, R) for each adapted tensor NAME of the model, and one
alpha: llama.cpp adds alpha/R · B·A, with the R of each tensor.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_exp.config import InputError
from lora_exp.models.weights.gguf_config import FIELDS, LENGTH, ROPE_FREQUENCIES
from lora_exp.models.weights.gguf_names import GgufNames
from lora_exp.models.weights.hf_writer import TensorToWrite

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}  # general.file_type
BYTES = {"F32": 4, "F16": 2, "Q8_0": 34 / 32}  # for each value
BLOCK_SIZE = 32  # values that share a scale in Q8_0
EXPERT = re.compile(r"\.experts\.(\d+)\.")
Settings = Mapping[str, Any]  # keys of a GGUF file


class AdapterTensor(NamedTuple):
  """The factors of one stored tensor's update: scale · (A·B)ᵀ is added to its values (O, I)."""

  hf_name: str
  a_IR: np.ndarray
  b_RO: np.ndarray
  scale: float


class _Entry(NamedTuple):
  """A tensor to write."""

  name: str
  shape: tuple[int, ...]
  kind: str  # a key of FILE_TYPES
  make: Callable[[], np.ndarray]


def write_gguf_model(
  file: Path, names: GgufNames, config: Mapping[str, Any], settings: Settings, tensors: Iterable[TensorToWrite],
  kind: str, done: Callable[[], object]
) -> None:
  """Writes a model with the matrices as `kind` (F32, F16, Q8_0), all other tensors in float32.

  Args:
    file: the file to write.
    names: the names of its tensors.
    config: the content of its config.json.
    settings: further keys, such as those of the tokenizer.
    tensors: the model as Hugging Face stores it.
    kind: the type of matrices. Those whose rows are no multiple of 32 values are F16 instead of Q8_0.
    done: is called after each tensor.

  Raises InputError for a rotary embedding or a tensor that the format does not have.
  """
  keys = {**_model_settings(names.name, config), "general.type": "model", "general.file_type": FILE_TYPES[kind],
          "general.quantization_version": 2, **settings}
  entries = [*_rope_entries(config), *(_entry(names, group, kind) for group in _grouped(tensors))]
  _write(file, names.name, keys, entries, done)


def write_gguf_adapter(
  file: Path, names: GgufNames, tensors: Sequence[AdapterTensor], settings: Settings, done: Callable[[], object]
) -> None:
  """Writes an adapter in float32.

  alpha is the most common one; where alpha/R is not the scale of a tensor, B contains the difference.
  """
  [(alpha, _)] = Counter(tensor.scale * tensor.a_IR.shape[1] for tensor in tensors).most_common(1)
  entries = []
  for tensor in tensors:
    name = names.tensor_name(tensor.hf_name)
    factor = tensor.scale * tensor.a_IR.shape[1] / alpha
    a_RI = np.ascontiguousarray(tensor.a_IR.T, np.float32)
    b_OR = np.asarray(tensor.b_RO.T, np.float32) * np.float32(factor)
    entries += [_stored(f"{name}.lora_a", a_RI), _stored(f"{name}.lora_b", names.rows(tensor.hf_name, b_OR))]
  keys = {"general.type": "adapter", "general.file_type": 0, "adapter.type": "lora",
          "adapter.lora.alpha": float(alpha), **settings}
  _write(file, names.name, keys, entries, done)


def _stored(name: str, x: np.ndarray) -> _Entry:
  """The entry of a float32 array."""
  return _Entry(name, x.shape, "F32", lambda: x)


def _model_settings(name: str, config: Mapping[str, Any]) -> Settings:
  """The keys of an architecture, from the fields of config.json."""
  fields = {key: config[field] for key, field in FIELDS.items() if config.get(field) is not None}
  keys: dict[str, Any] = {f"{name}.{key}": value for key, value in fields.items()}
  head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
  # llama.cpp takes some of these from others if they are missing, but by rules that differ between architectures.
  keys |= {f"{name}.attention.key_length": head, f"{name}.attention.value_length": head,
           f"{name}.rope.dimension_count": int(head * (config.get("partial_rotary_factor") or 1)),
           f"{name}.vocab_size": config["vocab_size"]}
  keys.setdefault(f"{name}.attention.head_count_kv", config["num_attention_heads"])
  if keys.get(f"{name}.attention.sliding_window") and config.get("use_sliding_window") is False:
    del keys[f"{name}.attention.sliding_window"]
  scaling = config.get("rope_scaling") or {}
  kind = scaling.get("rope_type", scaling.get("type", "default"))
  if kind not in ("default", "linear", "llama3"):
    raise InputError(f"rope_type={kind} is not written to GGUF files; supported are default, linear and llama3")
  if kind == "linear":
    keys |= {f"{name}.rope.scaling.type": "linear", f"{name}.rope.scaling.factor": float(scaling["factor"])}
  return {key: _typed(key, value) for key, value in keys.items()}


def _typed(key: str, value: Any) -> Any:
  """`value` as a float for the keys that are floats."""
  floats = ("_epsilon", "freq_base", "softcapping")
  return float(value) if key.endswith(floats) else value


def _rope_entries(config: Mapping[str, Any]) -> list[_Entry]:
  """The divisors of the rotary frequencies of Llama 3.1, which llama.cpp stores as a tensor.

  Source: `_compute_llama3_parameters` of transformers.
  """
  scaling = config.get("rope_scaling") or {}
  if scaling.get("rope_type") != "llama3":
    return []
  head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
  wave = 2 * math.pi * config["rope_theta"] ** (np.arange(0, head, 2) / head)
  turns = scaling[LENGTH] / wave
  low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
  smooth = np.clip((turns - low) / (high - low), 0, 1)
  return [_stored(ROPE_FREQUENCIES, (1 / ((1 - smooth) / factor + smooth)).astype(np.float32))]


def _grouped(tensors: Iterable[TensorToWrite]) -> list[list[TensorToWrite]]:
  """The stored tensors of each tensor of the file: one, or those of all experts."""
  groups: dict[str, list[TensorToWrite]] = {}
  for tensor in tensors:
    groups.setdefault(EXPERT.sub(".experts.{}.", tensor.name), []).append(tensor)
  return list(groups.values())


def _entry(names: GgufNames, group: Sequence[TensorToWrite], kind: str) -> _Entry:
  """The entry of a tensor, or of the stacked kernels of all experts."""
  is_stack = EXPERT.search(group[0].name) is not None
  name = EXPERT.sub(".experts.{}.", group[0].name)
  shape = (len(group), *group[0].shape) if is_stack else group[0].shape
  router = name.endswith((".gate.weight",))
  matrix = len(shape) > 1 and not router
  stored = kind if matrix else "F32"
  if stored == "Q8_0" and shape[-1] % BLOCK_SIZE:
    stored = "F16"

  def make() -> np.ndarray:
    parts = [names.values(name, tensor.make()) for tensor in group]
    return np.stack(parts) if is_stack else parts[0]

  return _Entry(names.tensor_name(name), shape, stored, make)


def _write(file: Path, name: str, keys: Settings, entries: Sequence[_Entry], done: Callable[[], object]) -> None:
  """Writes the keys, the entries, and then one tensor at a time."""
  try:
    import gguf  # takes 3 s
  except ImportError:
    raise InputError("writing a GGUF file needs the package gguf: pip install gguf") from None
  writer = gguf.GGUFWriter(file, name)
  for key, value in keys.items():
    if isinstance(value, list):
      writer.add_array(key, value)
    else:
      vtype = gguf.GGUFValueType.get_type(value)
      writer.add_key_value(key, value, gguf.GGUFValueType.UINT32 if vtype == gguf.GGUFValueType.INT32 else vtype)
  for entry in entries:
    kind = gguf.GGMLQuantizationType[entry.kind]
    size = int(math.prod(entry.shape) * BYTES[entry.kind])
    writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for entry in entries:
    x = np.ascontiguousarray(entry.make(), np.float32)
    writer.write_tensor_data(gguf.quants.quantize(x, gguf.GGMLQuantizationType[entry.kind]))
    done()
  writer.close()

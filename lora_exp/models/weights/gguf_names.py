"""Names, order and values of tensors in GGUF files, from those of Hugging Face: the inverse of `gguf_checkpoint`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_exp.config import InputError
from lora_exp.models.weights.gguf_checkpoint import BLOCK_NAMES, NAMES, neighbours_from_halves
from lora_exp.models.weights.gguf_config import ARCHITECTURES, EXPERTS, GgufArchitecture

LLAMA_LIKE = {"mistral": "llama", "mixtral": "llama"}  # model_type -> the architecture that llama.cpp calls it
BLOCK = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class GgufNames:
  """The names and values of one model's tensors in a GGUF file."""

  name: str  # general.architecture
  architecture: GgufArchitecture
  modules: Mapping[str, str]  # module of a block in Hugging Face's names -> name in the block
  heads: int
  kv_heads: int

  def tensor_name(self, hf_name: str) -> str:
    """The name of a stored tensor. Raises InputError for a tensor that llama.cpp does not have."""
    stem, _, kind = hf_name.rpartition(".")
    block = BLOCK.fullmatch(hf_name)
    if block and block[2] in self.modules:
      return f"blk.{block[1]}.{self.modules[block[2]]}.{block[3]}"
    for name, module in NAMES.items():
      if module == stem:
        return f"{name}.{kind}"
    raise InputError(f"{hf_name}: llama.cpp's architecture {self.name} has no such tensor")

  def values(self, hf_name: str, x: np.ndarray) -> np.ndarray:
    """The values of a stored tensor, in float32: the order of q and k rows, and the scales of norms."""
    x = np.asarray(x, np.float32)
    x = self.rows(hf_name, x)
    return x + 1 if self.architecture.norm_offset and hf_name.endswith("norm.weight") else x

  def rows(self, hf_name: str, x: np.ndarray) -> np.ndarray:
    """`x` (O, …) with its rows in ggml's order, if the tensor is that of rotated queries or keys."""
    if not self.architecture.interleaved or not re.search(r"\.[qk]_proj\.(weight|bias)$", hf_name):
      return x
    return neighbours_from_halves(x, self.heads if ".q_proj." in hf_name else self.kv_heads)


def gguf_names(config: Mapping[str, Any] | None) -> GgufNames:
  """The names for the model of a config.json. Raises InputError for a model that GGUF files are not written for."""
  kind = str((config or {}).get("model_type"))
  by_type = {architecture.model_type: name for name, architecture in ARCHITECTURES.items() if name != "mistral"}
  by_type |= LLAMA_LIKE
  if config is None or kind not in by_type:
    raise InputError(f"GGUF files are written for {', '.join(by_type)}, not for this model"
                     f"{'' if config is None else f' ({kind})'}; use format=merged or format=peft")
  architecture = ARCHITECTURES[by_type[kind]]
  modules = BLOCK_NAMES | dict(architecture.names)
  heads = config["num_attention_heads"]
  inverse = {module: name for name, module in modules.items()}
  inverse |= {module: name for name, module in EXPERTS.get(kind, {}).items()}
  return GgufNames(by_type[kind], architecture, inverse, heads, config.get("num_key_value_heads") or heads)

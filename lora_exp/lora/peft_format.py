"""How PEFT stores a method: names of tensors, and the fields of adapter_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PeftFormat:
  """The file format of one method in PEFT. Leaves of two axes are stored transposed."""

  peft_type: str
  keys: Mapping[str, str]  # leaf -> end of its tensor's name
  table_keys: Mapping[str, str] | None = None  # of an embedding; None: PEFT does not adapt embeddings
  shared_keys: Mapping[str, str] = field(default_factory=dict)  # leaf that all modules share -> its tensor's name
  select: Mapping[str, Any] = field(default_factory=dict)  # config values that tell it from others of its peft_type
  constants: Mapping[str, Any] = field(default_factory=dict)  # further config values, always the same
  alpha_key: str | None = "lora_alpha"  # None: the scale is 1
  has_ranks: bool = True  # r and rank_pattern
  dropout_key: str | None = None
  bias_word: str | None = None  # what `bias` says for the biases of adapted modules; None: PEFT trains no biases
  rslora: bool = False  # use_rslora
  adapts_tied_head: bool = False  # ensure_weight_tying: an adapted table and its head share an adapter
  adapts_conv1d: bool = True  # GPT-2's layers
  column_axes: Mapping[str, int] = field(default_factory=dict)  # vector -> the axis of its length in a stored matrix
  harmless: frozenset[str] = frozenset()  # config fields that do not change what is computed


LORA_KEYS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
LORA_TABLE_KEYS = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}

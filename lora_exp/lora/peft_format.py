"""Declaration of a method's file format in PEFT: names of tensors and fields of adapter_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class PeftFormat:
  """The file format of a method in PEFT. Leaves with two axes are stored transposed."""

  peft_type: str
  keys: Mapping[str, str]  # leaf -> suffix of its tensor's name
  table_keys: Mapping[str, str] | None = None  # the same for embeddings; None: PEFT does not adapt embeddings
  shared_keys: Mapping[str, str] = field(default_factory=dict)  # shared leaf -> full name of its tensor
  select: Mapping[str, Any] = field(default_factory=dict)  # config values that distinguish methods of one peft_type
  alpha_key: str | None = "lora_alpha"  # config field of alpha; None: the scale is 1
  has_ranks: bool = True  # the config has a rank and rank_pattern
  rank_key: str = "r"  # config field of the rank
  mask_suffix: str = ""  # of the keys of rank_pattern, if it masks pruned ranks; the scale is alpha/(rank + 1e-5)
  dropout_key: str | None = None  # config field of the dropout rate
  bias_word: str | None = None  # value of `bias` for the biases of adapted modules; None: PEFT trains no biases
  rslora: bool = False  # PEFT supports use_rslora
  adapts_tied_head: bool = False  # PEFT supports ensure_weight_tying: a table and its tied head share an adapter
  adapts_conv1d: bool = True  # PEFT adapts the Conv1D layers of GPT-2
  adapts_experts: bool = False  # PEFT supports target_parameters
  output_bias: bool = False  # PEFT supports lora_bias
  column_axes: Mapping[str, int] = field(default_factory=dict)  # vector stored as a matrix -> axis of its length
  harmless: frozenset[str] = frozenset()  # config fields that do not affect the computation


LORA_KEYS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
LORA_TABLE_KEYS = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}

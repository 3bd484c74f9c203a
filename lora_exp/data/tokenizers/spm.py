"""tokenizer.model, by the library `sentencepiece`: Gemma, Llama 2, the first Mistral."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.base import Spelt, fingerprint_of, piece_bytes, valid
from lora_exp.data.tokenizers.beside import read_beside

try:
  import sentencepiece
  from google.protobuf.message import DecodeError
  from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
except ImportError:
  raise InputError("tokenizer.model is read by the package sentencepiece: pip install sentencepiece") from None

UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of pieces in sentencepiece_model.proto
# Gemma's file calls <start_of_turn> user-defined, as it does line breaks and HTML tags, and would read it in any text.
TURN = re.compile(r"<(start|end)_of_\w+>|<\|.*\|>|<(bos|eos|pad|mask)>")


def read(file: Path) -> "SentencePiece":
  """The tokenizer in `file`. Raises InputError if it is none."""
  content = file.read_bytes()
  try:
    model = ModelProto.FromString(content)
  except DecodeError:
    model = ModelProto()
  if not model.pieces:
    tiktoken = " (Llama 3's is tiktoken's: take the directory with its tokenizer.json)" if b"== " in content else ""
    raise InputError(f"{file} is no sentencepiece model, or was cut short{tiktoken}")
  return SentencePiece(file, model)


class SentencePiece(Spelt):
  """A sentencepiece model. Its control pieces, and those that mark turns of a chat, are never read in a text."""

  def __init__(self, file: Path, model: ModelProto):
    beside = read_beside(file.parent)
    content = model.SerializeToString(deterministic=True)
    whole = sentencepiece.SentencePieceProcessor(model_proto=content)
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    for piece in model.pieces:
      if piece.type == USER_DEFINED and (TURN.fullmatch(piece.piece) or piece.piece in beside.control):
        piece.type = CONTROL
    special = {piece.piece for piece in model.pieces if piece.type in (UNKNOWN, CONTROL)}
    bos, eos = (i if i >= 0 else None for i in (whole.bos_id(), whole.eos_id()))
    control = beside.resolved(file, ids, special, bos, eos)
    self._library = _load(model)
    space_first = self._library.encode("a", out_type=str)[0].startswith("\u2581")
    spelt = [piece.encode() if piece in control.tokens else piece_bytes(piece) for piece in ids]
    super().__init__(str(file), fingerprint_of(content, control), spelt, control, space_first)
    model.normalizer_spec.add_dummy_prefix = False
    self._going_on = _load(model)

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    pieces = self._library if start else self._going_on
    return pieces.encode([valid(text) for text in texts], num_threads=os.cpu_count() or 1)


def _load(model: ModelProto) -> "sentencepiece.SentencePieceProcessor":
  return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())

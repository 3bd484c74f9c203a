"""Reads tokenizer.json, and GPT-2's vocab.json with merges.txt, with the library `tokenizers`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.settings_files import TokenizerSettings, read_tokenizer_settings
from lora_exp.data.tokenizers.tokenizer import (
  PieceTokenizer,
  bytes_of,
  piece_bytes,
  tokenizer_fingerprint,
  without_surrogates,
)

try:
  import tokenizers as library
except ImportError:
  raise InputError("tokenizer.json is read by the package tokenizers: pip install tokenizers") from None

GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


def read(file: Path) -> "JsonTokenizer":
  """Reads the tokenizer in `file`: a tokenizer.json, or a vocab.json with merges.txt in the same directory.

  Raises InputError if it is neither.
  """
  settings = read_tokenizer_settings(file.parent)
  try:
    text = _gpt2_as_json(file, settings) if file.name == "vocab.json" else file.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{file} is not a tokenizer.json: byte {error.start} is not UTF-8") from error
  return JsonTokenizer(file, text, settings)


def _load(file: Path, text: str) -> "library.Tokenizer":
  try:
    loaded = library.Tokenizer.from_str(text)
  except Exception as error:  # the library raises nothing more special
    raise InputError(f"{file} is not a tokenizer.json, or is truncated: {error}") from error
  loaded.no_truncation()  # a file may have the settings of the run that saved it
  loaded.no_padding()
  return loaded


def _gpt2_as_json(file: Path, settings: TokenizerSettings) -> str:
  """Converts GPT-2's two files to a tokenizer.json. Raises InputError for models that split text differently."""
  if settings.tokenizer_class not in GPT2_CLASSES:
    raise InputError(f"{file}: vocab.json and merges.txt are read only for GPT-2, not for {settings.tokenizer_class}; "
                     "save it again with a tokenizer.json (save_pretrained in transformers)")
  try:
    made = library.Tokenizer(library.models.BPE.from_file(str(file), str(file.parent / "merges.txt")))
  except Exception as error:  # the library raises nothing more special
    raise InputError(f"{file} and merges.txt are not a BPE vocabulary, or are truncated: {error}") from error
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = library.decoders.ByteLevel()
  return made.to_str()


class JsonTokenizer(PieceTokenizer):
  """A tokenizer.json. Added tokens that are not special (Qwen's `<think>`) are matched in text."""

  def __init__(self, file: Path, text: str, settings: TokenizerSettings):
    self._library = tokenizer = _load(file, text)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    control = settings.control_tokens(file, ids, special, bos=_first_token(tokenizer))
    tokenizer.add_special_tokens([token for token in control.ids if token not in special])
    token_bytes = _token_bytes(tokenizer)
    pieces = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
      pieces[i] = token.encode() if token_bytes is None or token in control.ids else token_bytes(token)
    self._decoded_by_library = token_bytes is None
    adds_space = pieces[(tokenizer.encode("a", add_special_tokens=False).ids or [control.eot])[0]].startswith(b" ")
    super().__init__(str(file), tokenizer_fingerprint(text.encode(), control), pieces, control, adds_space)
    self.strips = {i: (token.lstrip, token.rstrip) for i, token in tokenizer.get_added_tokens_decoder().items()
                   if token.lstrip or token.rstrip}
    self._continuing = tokenizer
    if adds_space:
      self._continuing = _load(file, json.dumps(_without_space(json.loads(tokenizer.to_str()))))
      first = next(iter(control.ids))
      after = tokenizer.encode(f"{first}a", add_special_tokens=False).ids[1:]
      self.start_after_control = bool(after) and pieces[after[0]].startswith(b" ")
    tokenizer.encode_special_tokens = self._continuing.encode_special_tokens = True  # encode them as text
    self._control_ids = set(control.ids.values()) - {_unknown(tokenizer)}

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    tokenizer = self._library if start else self._continuing
    encoded = tokenizer.encode_batch_fast([without_surrogates(text) for text in texts], add_special_tokens=False)
    return [self._without_control(encoding.ids) for encoding in encoded]

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    if self._decoded_by_library:
      return self._library.decode(list(map(int, ids)), skip_special_tokens=False)
    return super().decode(ids, start)

  def _without_control(self, ids: list[int]) -> list[int]:
    """Replaces control tokens that are ordinary vocabulary entries (`</s>` of T5) by the ids of their letters."""
    if self._control_ids.isdisjoint(ids):
      return ids
    found: list[int] = []
    for i in ids:
      found += self._letters(i) if i in self._control_ids else [i]
    return found

  def _letters(self, control_id: int) -> list[int]:
    """The ids of the letters of a control token."""
    tokenize = self._library.model.tokenize
    return [token.id for letter in self.pieces[control_id].decode() for token in tokenize(letter)]


def _unknown(tokenizer: "library.Tokenizer") -> int | None:
  """The id of the unknown token, if there is one."""
  if isinstance(tokenizer.model, library.models.Unigram):
    return json.loads(tokenizer.model.__getstate__())["unk_id"]
  return tokenizer.model.token_to_id(tokenizer.model.unk_token) if tokenizer.model.unk_token else None


def _first_token(tokenizer: "library.Tokenizer") -> int | None:
  """The id that the file's post-processor puts before every text, if there is one."""
  processed, plain = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
  return processed[0] if processed[:1] != plain[:1] else None


def _parts(component: Any) -> list[dict[str, Any]]:
  """The settings of a normalizer, pre-tokenizer or decoder; for a sequence, those of its parts."""
  settings = component if isinstance(component, dict) else json.loads(component.__getstate__()) if component else {}
  inner = settings.get("normalizers") or settings.get("pretokenizers") or settings.get("decoders")
  return [part for one in inner for part in _parts(one)] if inner else [settings]


def _token_bytes(tokenizer: "library.Tokenizer") -> Callable[[str], bytes] | None:
  """Returns a function from tokens to bytes, or None if tokens do not determine the text (words without spaces)."""
  parts = _parts(tokenizer.decoder)
  kinds = {part.get("type") for part in parts}
  if "ByteLevel" in kinds:
    return bytes_of
  replaced = any(part.get("type") == "Replace" and part.get("content") == " " for part in parts)
  return piece_bytes if "Metaspace" in kinds or replaced else None


def _without_space(settings: dict[str, Any]) -> dict[str, Any]:
  """The `settings` of a tokenizer.json, changed such that no space is prepended to a text."""
  for part in _parts(settings["pre_tokenizer"] or {}):
    if part.get("type") == "Metaspace":
      part["prepend_scheme"] = "never"
    elif part.get("type") == "ByteLevel":
      part["add_prefix_space"] = False
  normalizer = settings["normalizer"] or {}
  if normalizer.get("type") == "Prepend":
    settings["normalizer"] = None
  elif normalizer.get("type") == "Sequence":
    normalizer["normalizers"] = [part for part in normalizer["normalizers"] if part.get("type") != "Prepend"]
  return settings

"""Reads tokenizer.json, and vocab.json with merges.txt (GPT-2, Qwen2), with the library `tokenizers`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization.added_tokens import LARGEST_ID, AddedToken
from lora_exp.data.tokenization.settings_files import TokenizerSettings, read_tokenizer_settings
from lora_exp.data.tokenization.split_patterns import QWEN2
from lora_exp.data.tokenization.tokenizer import (
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

UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
SPLITS = {  # tokenizer_class -> the pattern that splits a text before merging; None: as GPT-2 does
  None: None, "GPT2Tokenizer": None, "GPT2TokenizerFast": None,
  "Qwen2Tokenizer": QWEN2, "Qwen2TokenizerFast": QWEN2,
}  # fmt: skip


def read(file: Path) -> "JsonTokenizer":
  """Reads the tokenizer in `file`: a tokenizer.json, or a vocab.json with merges.txt in the same directory.

  Raises InputError if it is neither.
  """
  settings = read_tokenizer_settings(file.parent)
  try:
    text = _files_as_json(file, settings) if file.name == "vocab.json" else file.read_text(encoding="utf-8")
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


def _files_as_json(file: Path, settings: TokenizerSettings) -> str:
  """Converts vocab.json and merges.txt to a tokenizer.json, with the added tokens of the settings.

  Raises InputError for tokenizers that split text in an unknown way, and for an id with two tokens.
  """
  if settings.tokenizer_class not in SPLITS:
    raise InputError(f"{file}: vocab.json and merges.txt are read only for GPT-2 and Qwen2, not for "
                     f"{settings.tokenizer_class}; save it again with a tokenizer.json (save_pretrained in "
                     "transformers)")
  try:
    ids, merges = library.models.BPE.read_file(str(file), str(file.parent / "merges.txt"))
    added = settings.missing_tokens(ids)
    taken = [(token.content, i) for i, token in added.items() if i in set(ids.values())]
    made = library.Tokenizer(library.models.BPE(ids | {token.content: i for i, token in added.items()}, merges))
  except Exception as error:  # the library raises nothing more special
    raise InputError(f"{file} and merges.txt are not a BPE vocabulary, or are truncated: {error}") from error
  if taken:
    raise InputError(f"{file}: the settings give the added token {taken[0][0]!r} the id {taken[0][1]}, which another "
                     "token has")
  split = SPLITS[settings.tokenizer_class]
  by_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=settings.add_prefix_space, use_regex=split is None)
  made.pre_tokenizer = by_bytes
  if split is not None:
    made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
      [library.pre_tokenizers.Split(library.Regex(split), "isolated"), by_bytes])
  made.decoder = library.decoders.ByteLevel()
  made.add_tokens([_added(token) for token in {**settings.declared, **added}.values()])
  return str(made.to_str())


def byte_level_json(
  file: Path, ids: dict[str, int], merges: Sequence[Any], split: str, added: Sequence[tuple[str, bool]]
) -> str:
  """The tokenizer.json of byte-level BPE with the pattern `split`; `added` are (token, whether it is special)."""
  try:
    made = library.Tokenizer(library.models.BPE(ids, merges))
  except Exception as error:  # the library raises nothing more special
    raise InputError(f"{file}: its tokens and merges are not a BPE vocabulary: {error}") from error
  by_bytes = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  parts = [library.pre_tokenizers.Split(library.Regex(split), "isolated"), by_bytes]
  made.pre_tokenizer = library.pre_tokenizers.Sequence(parts)
  made.decoder = library.decoders.ByteLevel()
  made.add_tokens([library.AddedToken(token, special=special, normalized=False) for token, special in added])
  return str(made.to_str())


def _added(token: AddedToken) -> "library.AddedToken":
  return library.AddedToken(token.content, special=token.special, **token.flags)


def _add_missing(file: Path, tokenizer: "library.Tokenizer", settings: TokenizerSettings) -> bool:
  """Adds the tokens that the settings declare and the file lacks. Returns whether there are any.

  Raises InputError if one of their ids is not the next free one, because the library assigns the ids itself.
  """
  missing = settings.missing_tokens(tokenizer.get_vocab(with_added_tokens=True))
  tokenizer.add_tokens([_added(token) for token in missing.values()])
  for i, token in missing.items():
    given = tokenizer.token_to_id(token.content)
    if given != i:
      raise InputError(f"{file}: the settings in its directory give the added token {token.content!r} the id {i}, but "
                       f"the next free id is {given}; save the tokenizer again with this token")
  return bool(missing)


class JsonTokenizer(PieceTokenizer):
  """A tokenizer.json. Added tokens that are not special (Qwen's `<think>`) are matched in text."""

  def __init__(self, file: Path, text: str, settings: TokenizerSettings):
    self._library = tokenizer = _load(file, text)
    if _add_missing(file, tokenizer, settings):
      text = tokenizer.to_str()
    ids = tokenizer.get_vocab(with_added_tokens=True)
    if max(ids.values(), default=0) > LARGEST_ID:
      raise InputError(f"{file}: the id {max(ids.values())} of a token is too large")
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    control = settings.control_tokens(file, ids, special, bos=_first_token(tokenizer))
    tokenizer.add_special_tokens([token for token in control.ids if token not in special])
    token_bytes = _token_bytes(tokenizer)
    pieces = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
      pieces[i] = token.encode() if token_bytes is None or token in control.ids else token_bytes(token)
    self._decoded_by_library = token_bytes is None
    self.files = {"tokenizer.json": text.encode()}
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
    unknown = _unknown(tokenizer)
    self.unknown = None if unknown in (self.bos, *self.stops) else unknown  # GPT-2's is its end of text
    if token_bytes is bytes_of and unknown is None and _keeps_bytes(tokenizer):
      self.missing_bytes = UTF8_BYTES - {piece[0] for piece in pieces if len(piece) == 1}
    self._control_ids = set(control.ids.values()) - {unknown}

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


def _keeps_bytes(tokenizer: "library.Tokenizer") -> bool:
  """Whether a byte-level tokenizer splits a text into its bytes, and merges these."""
  normalised = {part.get("type") for part in _parts(tokenizer.normalizer)} - {None, "NFC"}
  return isinstance(tokenizer.model, library.models.BPE) and not normalised


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

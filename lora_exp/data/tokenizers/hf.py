"""tokenizer.json, and GPT-2's vocab.json with merges.txt, by the library `tokenizers`."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.base import BpeTokenizer, bytes_of, fingerprint_of, piece_bytes, valid
from lora_exp.data.tokenizers.sidecar_files import SidecarFiles, read_sidecar_files

try:
  import tokenizers as library
except ImportError:
  raise InputError("tokenizer.json is read by the package tokenizers: pip install tokenizers") from None

GPT2 = (None, "GPT2Tokenizer", "GPT2TokenizerFast")


def read(file: Path) -> "Json":
  """The tokenizer in `file`: a tokenizer.json, or a vocab.json with merges.txt beside it. InputError if it is none."""
  beside = read_sidecar_files(file.parent)
  try:
    text = _gpt2(file, beside) if file.name == "vocab.json" else file.read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise InputError(f"{file} is no tokenizer.json: byte {error.start} is not UTF-8") from error
  return Json(file, text, beside)


def _load(file: Path, text: str) -> "library.Tokenizer":
  try:
    loaded = library.Tokenizer.from_str(text)
  except Exception as error:  # the library raises nothing more special
    raise InputError(f"{file} is no tokenizer.json, or was cut short: {error}") from error
  loaded.no_truncation()  # a file may keep the settings of the run that saved it
  loaded.no_padding()
  return loaded


def _gpt2(file: Path, beside: SidecarFiles) -> str:
  """GPT-2's two files as a tokenizer.json: other models with such files split text in other ways."""
  if beside.tokenizer_class not in GPT2:
    raise InputError(f"{file}: vocab.json and merges.txt are read for GPT-2 alone, this is {beside.tokenizer_class}; "
                     "save it anew with a tokenizer.json, as save_pretrained of transformers does")
  try:
    made = library.Tokenizer(library.models.BPE.from_file(str(file), str(file.parent / "merges.txt")))
  except Exception as error:  # the library raises nothing more special
    raise InputError(f"{file} and merges.txt are no BPE, or were cut short: {error}") from error
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = library.decoders.ByteLevel()
  return made.to_str()


class Json(BpeTokenizer):
  """A tokenizer.json. Added tokens that are not special (Qwen's `<think>`) are text like any other."""

  def __init__(self, file: Path, text: str, beside: SidecarFiles):
    self._library = tokenizer = _load(file, text)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    control = beside.resolved(file, ids, special, bos=_first_of_all(tokenizer))
    tokenizer.add_special_tokens([token for token in control.tokens if token not in special])
    bytes_by = _spelling(tokenizer)
    spelt = [b""] * (max(ids.values()) + 1)
    for token, i in ids.items():
      spelt[i] = token.encode() if bytes_by is None or token in control.tokens else bytes_by(token)
    self._by_library = bytes_by is None
    space_first = spelt[(tokenizer.encode("a", add_special_tokens=False).ids or [control.eot])[0]].startswith(b" ")
    super().__init__(str(file), fingerprint_of(text.encode(), control), spelt, control, space_first)
    self._going_on = tokenizer
    if space_first:
      self._going_on = _load(file, json.dumps(_without_space(json.loads(tokenizer.to_str()))))
      first = next(iter(control.tokens))
      after = tokenizer.encode(f"{first}a", add_special_tokens=False).ids[1:]
      self.start_after_control = bool(after) and spelt[after[0]].startswith(b" ")
    tokenizer.encode_special_tokens = self._going_on.encode_special_tokens = True  # encode them as text, that is
    self._never = set(control.tokens.values()) - {_unknown(tokenizer)}

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    tokenizer = self._library if start else self._going_on
    encoded = tokenizer.encode_batch_fast([valid(text) for text in texts], add_special_tokens=False)
    return [self._as_text(encoding.ids) for encoding in encoded]

  def decode(self, ids: Sequence[int], start: bool = True) -> str:
    if self._by_library:
      return self._library.decode(list(map(int, ids)), skip_special_tokens=False)
    return super().decode(ids, start)

  def _as_text(self, ids: list[int]) -> list[int]:
    """`ids` with each control token that a model's vocabulary holds like a word (`</s>` of T5) in its letters."""
    if self._never.isdisjoint(ids):
      return ids
    letters = lambda i: [t.id for letter in self.spelt[i].decode() for t in self._library.model.tokenize(letter)]
    return [j for i in ids for j in (letters(i) if i in self._never else [i])]


def _unknown(tokenizer: "library.Tokenizer") -> int | None:
  """The id of what has no token."""
  if isinstance(tokenizer.model, library.models.Unigram):
    return json.loads(tokenizer.model.__getstate__())["unk_id"]
  return tokenizer.model.token_to_id(tokenizer.model.unk_token) if tokenizer.model.unk_token else None


def _first_of_all(tokenizer: "library.Tokenizer") -> int | None:
  """The id that the file's own post-processor puts before every text."""
  with_it, without = (tokenizer.encode("a", add_special_tokens=add).ids for add in (True, False))
  return with_it[0] if with_it[:1] != without[:1] else None


def _parts(component: Any) -> list[dict[str, Any]]:
  """A normalizer, pre-tokenizer or decoder as its settings; a sequence as those of its parts."""
  settings = component if isinstance(component, dict) else json.loads(component.__getstate__()) if component else {}
  inner = settings.get("normalizers") or settings.get("pretokenizers") or settings.get("decoders")
  return [part for one in inner for part in _parts(one)] if inner else [settings]


def _spelling(tokenizer: "library.Tokenizer") -> Callable[[str], bytes] | None:
  """How a token is written; None where tokens do not tell the text (words without their spaces)."""
  parts = _parts(tokenizer.decoder)
  kinds = {part.get("type") for part in parts}
  if "ByteLevel" in kinds:
    return bytes_of
  replaced = any(part.get("type") == "Replace" and part.get("content") == " " for part in parts)
  return piece_bytes if "Metaspace" in kinds or replaced else None


def _without_space(settings: dict[str, Any]) -> dict[str, Any]:
  """The settings of a tokenizer.json that puts no space before a text."""
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

"""The vocabulary in a GGUF file: byte-level BPE, or a sentencepiece model.

Byte-level BPE with ids in merge order is run by tiktoken, any other by the library `tokenizers`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization.settings_files import TokenizerSettings
from lora_exp.data.tokenization.split_patterns import PATTERNS
from lora_exp.data.tokenization.tokenizer import ControlTokens, PieceTokenizer, bytes_of
from lora_exp.runtime.cache import fingerprint
from lora_exp.runtime.gguf_header import read_header

ADVICE = "set model.tokenizer= to the model's tokenizer.json or tokenizer.model"
REQUIRED = {  # tokenizer.ggml.model -> the lists that it needs
  "gpt2": ("ggml.tokens", "ggml.token_type", "ggml.merges"),
  "llama": ("ggml.tokens", "ggml.token_type", "ggml.scores"),
}
BOS_FIRST = ("llama-bpe", "llama3", "llama-v3", "llama")  # default if the file does not state it
CONTROL, USER_DEFINED = ADDED = 3, 4  # types of tokens
UNUSED = 5


def read(file: Path) -> PieceTokenizer:
  """Reads the tokenizer in `file`. Raises InputError if its kind is not supported, or if it is incomplete."""
  header = read_header(file)
  kind = header.get("tokenizer.ggml.model")
  if kind not in REQUIRED:
    raise InputError(f"{file}: its tokenizer has the kind {kind}; supported in GGUF files are byte-level BPE (gpt2) "
                     f"and sentencepiece (llama); {ADVICE}")
  settings = {key.removeprefix("tokenizer."): value for key, value in header.items() if key.startswith("tokenizer.")}
  if kind == "gpt2" and "ggml.merges" not in settings and all(len(token) == 1 for token in _ranks(settings)):
    settings["ggml.merges"] = []  # an empty list is not written
  absent = [name for name in REQUIRED[kind] if not isinstance(settings.get(name), list)]
  if absent:
    raise InputError(f"{file}: tokenizer.{absent[0]} is missing")
  if kind == "llama":
    return _sentencepiece(file, settings)
  pre = settings.get("ggml.pre")
  if pre not in PATTERNS:
    raise InputError(f"{file}: tokenizer.ggml.pre={pre} is not one of {', '.join(PATTERNS)}; {ADVICE}")
  return GgufTokenizer(file, settings) if _is_in_merge_order(settings) else _by_merges(file, settings)


def _sentencepiece(file: Path, settings: Mapping[str, Any]) -> PieceTokenizer:
  """The tokenizer of a file with a sentencepiece model (Llama 2, Mistral, Gemma)."""
  from lora_exp.data.tokenization import sentencepiece_model  # needs a package of its own

  rows = list(zip(settings["ggml.tokens"], settings["ggml.scores"], settings["ggml.token_type"], strict=True))
  content = sentencepiece_model.model_of(rows, bool(settings.get("ggml.add_space_prefix", True)))
  return sentencepiece_model.tokenizer_of(file, content, _settings(file, settings))


def _by_merges(file: Path, settings: Mapping[str, Any]) -> PieceTokenizer:
  """The tokenizer of a file with byte-level BPE whose ids are not in merge order."""
  from lora_exp.data.tokenization import tokenizer_json  # needs a package of its own

  tokens, types = settings["ggml.tokens"], settings["ggml.token_type"]
  added = [(token, kind == CONTROL) for token, kind in zip(tokens, types, strict=True) if kind in ADDED]
  merges = [tuple(merge.split(" ", 1)) for merge in settings["ggml.merges"]]
  ids = {token: i for i, token in enumerate(tokens)}
  text = tokenizer_json.byte_level_json(file, ids, merges, PATTERNS[settings["ggml.pre"]], added)
  return tokenizer_json.JsonTokenizer(file, text, _settings(file, settings))


def _settings(file: Path, settings: Mapping[str, Any]) -> TokenizerSettings:
  """The settings in the file, in the form of those of a tokenizer's directory."""
  control = _control_tokens(file, settings)
  return TokenizerSettings(
    named_tokens=control.template_variables, special=set(control.ids), add_bos=control.bos is not None,
    add_prefix_space=False, ends=control.stops, chat_template=control.chat_template, tokenizer_class=None, declared={},
    ordered=())


def _ranks(settings: Mapping[str, Any]) -> dict[bytes, int]:
  """The tokens that are merged from bytes, with their ids."""
  kinds = zip(settings.get("ggml.tokens", []), settings.get("ggml.token_type", []), strict=False)
  eos = settings.get("ggml.eos_token_id")
  return {bytes_of(token): i for i, (token, kind) in enumerate(kinds) if kind not in (*ADDED, UNUSED) and i != eos}


def _is_in_merge_order(settings: Mapping[str, Any]) -> bool:
  ranks = _ranks(settings)
  merged = [ranks.get(bytes_of(merge.replace(" ", "", 1)), -1) for merge in settings["ggml.merges"]]
  return merged == sorted(merged)


class GgufTokenizer(PieceTokenizer):
  """Byte-level BPE. Bytes without a token (SmolLM2 lacks 21, all rare) are dropped after merging."""

  def __init__(self, file: Path, settings: Mapping[str, Any]):
    tokens, types = settings["ggml.tokens"], settings["ggml.token_type"]
    kinds = list(zip(tokens, types, strict=True))
    pieces = [token.encode() if kind in ADDED else bytes_of(token) for token, kind in kinds]
    super().__init__(str(file), fingerprint(**settings), pieces, _control_tokens(file, settings))
    ranks = _ranks(settings)
    # tiktoken panics at a byte without a rank, so such bytes get ranks beyond the vocabulary and are dropped later.
    absent = [bytes((b,)) for b in range(256) if bytes((b,)) not in ranks]
    ranks |= {byte: self.vocab_size + n for n, byte in enumerate(absent)}
    self.split = settings["ggml.pre"]
    # Added tokens that are not control tokens may occur in a text, where each is one id.
    self.added = {token: i for i, (token, kind) in enumerate(kinds) if kind == USER_DEFINED}
    self._encoding = tiktoken.Encoding(
      file.name, pat_str=PATTERNS[settings["ggml.pre"]], mergeable_ranks=ranks, special_tokens=self.added)

  def encode(self, text: str, start: bool = True) -> list[int]:
    return self._known(self._encoding.encode(text, allowed_special=set(self.added), disallowed_special=()))

  def encode_batch(self, texts: Sequence[str], start: bool = True) -> list[list[int]]:
    encoded = self._encoding.encode_batch(
      list(texts), num_threads=os.cpu_count() or 1, allowed_special=set(self.added), disallowed_special=())
    return [self._known(ids) for ids in encoded]

  def _known(self, ids: list[int]) -> list[int]:
    """`ids` without those beyond the vocabulary."""
    return ids if max(ids, default=0) < self.vocab_size else [i for i in ids if i < self.vocab_size]


def _split_name(settings: Mapping[str, Any]) -> str:
  """The name of the pattern that splits text; llama for a sentencepiece model."""
  return "llama" if settings.get("ggml.model") == "llama" else str(settings.get("ggml.pre"))


def _control_tokens(file: Path, settings: Mapping[str, Any]) -> ControlTokens:
  """The control tokens in the header. Raises InputError if there is no end-of-text token."""
  tokens = settings["ggml.tokens"]
  named = {name: settings.get(f"ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
  ids = {name: i for name, i in named.items() if i is not None and i < len(tokens)}
  if "eos" not in ids:
    raise InputError(f"{file}: there is no end-of-text token: tokenizer.ggml.eos_token_id is missing")
  control = {token: i for i, (token, kind) in enumerate(zip(tokens, settings["ggml.token_type"], strict=True))
             if kind == CONTROL or i == ids["eos"]}
  bos_first = settings.get("ggml.add_bos_token", _split_name(settings) in BOS_FIRST)
  return ControlTokens(control, ids["eos"], ids.get("bos") if bos_first else None,
                 tuple(ids[name] for name in ("eot", "eom") if name in ids), settings.get("chat_template"),
                 {f"{name}_token": tokens[i] for name, i in ids.items()})

"""Saves a tokenizer for transformers: as the files that it was read from, or as a tokenizer.json of its tokens."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_exp.data.tokenization import get_tokenizer
from lora_exp.data.tokenization.gguf_vocabulary import GgufTokenizer
from lora_exp.data.tokenization.split_patterns import PATTERNS
from lora_exp.data.tokenization.tokenizer import PieceTokenizer, byte_level
from lora_exp.data.tokenization.tokenizer_files import find_tokenizer_file

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "chat_template.jinja", "chat_template.json")
BY_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = BY_GPT2 | {"use_regex": False}


def save_tokenizer(directory: Path, name: str, weights: str | None) -> None:
  """Writes the tokenizer `name` (see `get_tokenizer`) such that AutoTokenizer of transformers loads it.

  The files of a checkpoint are copied. For built-in tokenizers and those of GGUF files, tokenizer.json and
  tokenizer_config.json are written, with the same ids except for bytes that have no token.
  """
  file = find_tokenizer_file(name, weights)
  if file is None or file.suffix == ".gguf":
    tokenizer = get_tokenizer(name, weights)
    assert isinstance(tokenizer, PieceTokenizer)
    for name, content in tokenizer.files.items():
      (directory / name).write_bytes(content)
    if not tokenizer.files:
      _write(directory / "tokenizer.json", _json(tokenizer))
    _write(directory / "tokenizer_config.json", _settings(tokenizer))
    return
  for other in (file.parent / name for name in FILES):
    if other.is_file():
      shutil.copyfile(other, directory / other.name)
  if file.name not in FILES:
    shutil.copyfile(file, directory / ("tokenizer.json" if file.suffix == ".json" else "tokenizer.model"))


def _write(file: Path, content: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _settings(tokenizer: PieceTokenizer) -> dict[str, Any]:
  """The content of tokenizer_config.json. Its class uses tokenizer.json without changes."""
  eos = next(token for token, i in tokenizer.special_tokens.items() if i == tokenizer.eot)
  named_tokens = {"eos_token": eos}
  if "bos_token" in tokenizer.template_variables:
    named_tokens["bos_token"] = tokenizer.template_variables["bos_token"]
  template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
  kind = "LlamaTokenizer" if "tokenizer.model" in tokenizer.files else "PreTrainedTokenizerFast"
  return {"tokenizer_class": kind, **named_tokens, "clean_up_tokenization_spaces": False,
          **template}


def _json(tokenizer: PieceTokenizer) -> dict[str, Any]:
  """The content of tokenizer.json for byte-level BPE."""
  text = tokenizer.added if isinstance(tokenizer, GgufTokenizer) else {}  # occur in texts
  added = {**tokenizer.special_tokens, **text}
  ranks = {piece: i for i, piece in enumerate(tokenizer.pieces) if i not in added.values()}
  vocab = {byte_level(piece): i for piece, i in ranks.items()} | added
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  first = next((token for token, i in tokenizer.special_tokens.items() if i == tokenizer.bos), None)
  return {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": i, "content": token, **flags, "special": token not in text}
                     for token, i in sorted(added.items(), key=lambda item: item[1])],
    "normalizer": None,
    "pre_tokenizer": _split(tokenizer),
    "post_processor": None if first is None else _first_token(first, added[first]),
    "decoder": BY_GPT2,
    "model": {
      "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": list(_merges(ranks)),
    },
  }  # fmt: skip


def _merges(ranks: Mapping[bytes, int]) -> Iterator[list[str]]:
  """The merges of tiktoken: every pair of tokens that together form a token, in the order of that token."""
  for token in sorted(ranks, key=ranks.__getitem__):
    halves = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in ranks and token[n:] in ranks]
    for left, right in sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
      yield [byte_level(left), byte_level(right)]


def _split(tokenizer: PieceTokenizer) -> dict[str, Any]:
  """The pre-tokenizer, written like the published tokenizer.json of such models."""
  kind = tokenizer.split if isinstance(tokenizer, GgufTokenizer) else tokenizer.name
  if kind == "bytes":
    return BYTES
  if kind == "smollm":
    return _sequence({"type": "Digits", "individual_digits": True}, BY_GPT2)
  if kind in ("gpt-2", "gpt2", "gpt2_4096"):
    return BY_GPT2
  pattern = {"type": "Split", "pattern": {"Regex": PATTERNS[kind]}, "behavior": "Isolated", "invert": False}
  return _sequence(pattern, BYTES)


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
  return {"type": "Sequence", "pretokenizers": list(parts)}


def _first_token(token: str, i: int) -> dict[str, Any]:
  """The post-processor that prepends `token` to every text."""
  before, a, b = ({"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                  {"Sequence": {"id": "B", "type_id": 1}})
  between = {"SpecialToken": {"id": token, "type_id": 1}}
  return {"type": "TemplateProcessing", "single": [before, a], "pair": [before, a, between, b],
          "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}

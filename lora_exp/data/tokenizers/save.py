"""A tokenizer as the files that transformers loads: those that lie with it, or a tokenizer.json made of its tokens."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_exp.data.tokenizers import get_tokenizer
from lora_exp.data.tokenizers.base import BpeTokenizer, byte_level
from lora_exp.data.tokenizers.files import find
from lora_exp.data.tokenizers.gguf import PATTERNS, Gguf

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "chat_template.jinja", "chat_template.json")
BY_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = BY_GPT2 | {"use_regex": False}


def save_tokenizer(directory: Path, name: str, weights: str | None) -> None:
  """Writes the tokenizer `name` (as `get_tokenizer` takes it) so that AutoTokenizer of transformers loads it.

  One that has files of its own is copied. Of byte-level BPE without any (GGUF, the built-in ones) tokenizer.json and
  tokenizer_config.json are made: the same ids, apart from texts with bytes that have no token.
  """
  file = find(name, weights)
  if file is None or file.suffix == ".gguf":
    tokenizer = get_tokenizer(name, weights)
    assert isinstance(tokenizer, BpeTokenizer)
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


def _settings(tokenizer: BpeTokenizer) -> dict[str, Any]:
  """tokenizer_config.json; the class is the one that takes tokenizer.json as it is."""
  eos = next(token for token, i in tokenizer.special_tokens.items() if i == tokenizer.eot)
  words = {"eos_token": eos} | {key: tokenizer.template_words[key] for key in ("bos_token",)
                                if key in tokenizer.template_words}
  template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
  return {"tokenizer_class": "PreTrainedTokenizerFast", **words, "clean_up_tokenization_spaces": False, **template}


def _json(tokenizer: BpeTokenizer) -> dict[str, Any]:
  """tokenizer.json of byte-level BPE."""
  text = tokenizer.added if isinstance(tokenizer, Gguf) else {}  # stand for themselves in a text, and are no controls
  added = {**tokenizer.special_tokens, **text}
  ranks = {spelt: i for i, spelt in enumerate(tokenizer.spelt) if i not in added.values()}
  vocab = {byte_level(spelt): i for spelt, i in ranks.items()} | added
  flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
  first = next((token for token, i in tokenizer.special_tokens.items() if i == tokenizer.bos), None)
  return {
    "version": "1.0", "truncation": None, "padding": None,
    "added_tokens": [{"id": i, "content": token, **flags, "special": token not in text}
                     for token, i in sorted(added.items(), key=lambda item: item[1])],
    "normalizer": None,
    "pre_tokenizer": _split(tokenizer),
    "post_processor": None if first is None else _begins_with(first, added[first]),
    "decoder": BY_GPT2,
    "model": {
      "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": list(_merges(ranks)),
    },
  }  # fmt: skip


def _merges(ranks: Mapping[bytes, int]) -> Iterator[list[str]]:
  """Every pair of tokens that make a third, in the order of the third: how tiktoken merges."""
  for token in sorted(ranks, key=ranks.__getitem__):
    halves = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in ranks and token[n:] in ranks]
    for left, right in sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
      yield [byte_level(left), byte_level(right)]


def _split(tokenizer: BpeTokenizer) -> dict[str, Any]:
  """How text is cut before merging, in the parts that the published tokenizer.json of such a model has."""
  kind = tokenizer.split if isinstance(tokenizer, Gguf) else tokenizer.name
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


def _begins_with(token: str, i: int) -> dict[str, Any]:
  one = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}
  bos = lambda kind: {"SpecialToken": {"id": token, "type_id": kind}}
  return {"type": "TemplateProcessing", "single": [bos(0), one("A", 0)],
          "pair": [bos(0), one("A", 0), bos(1), one("B", 1)],
          "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}  # fmt: skip

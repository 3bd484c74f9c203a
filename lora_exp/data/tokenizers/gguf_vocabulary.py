"""The vocabulary in a GGUF file: byte-level BPE with ids in merge order, run by tiktoken."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.gguf_header import read_header
from lora_exp.data.tokenizers.tokenizer import ControlTokens, PieceTokenizer, bytes_of
from lora_exp.runtime.cache import fingerprint

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
PATTERNS = {  # how text is split before merging, by tokenizer.ggml.pre
  "gpt-2": r50k_pat_str,
  "llama-bpe": LLAMA3,
  "qwen2": LLAMA3.replace("{1,3}", ""),
  # Single digits, then GPT-2's pattern. Whitespace before a digit is split as at the end of the text.
  "smollm": r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s",
}
ADVICE = "set model.tokenizer= to the model's tokenizer.json or tokenizer.model"
REQUIRED = ("ggml.tokens", "ggml.token_type", "ggml.merges")
BOS_FIRST = ("llama-bpe",)  # default if the file does not state it
CONTROL, USER_DEFINED = ADDED = 3, 4  # types of tokens


def read(file: Path) -> "GgufTokenizer":
  """Reads the tokenizer in `file`. Raises InputError if it is not byte-level BPE, or is incomplete."""
  header = read_header(file)
  if header.get("tokenizer.ggml.model") != "gpt2":
    raise InputError(f"{file}: its tokenizer is of the kind {header.get('tokenizer.ggml.model')}, and only byte-level "
                     f"BPE (gpt2) is read from GGUF; {ADVICE}")
  if (pre := header.get("tokenizer.ggml.pre")) not in PATTERNS:
    raise InputError(f"{file}: tokenizer.ggml.pre={pre} is not one of {', '.join(PATTERNS)}; {ADVICE}")
  settings = {key.removeprefix("tokenizer."): value for key, value in header.items() if key.startswith("tokenizer.")}
  if absent := [name for name in REQUIRED if not isinstance(settings.get(name), list)]:
    raise InputError(f"{file}: tokenizer.{absent[0]} is missing")
  return GgufTokenizer(file, settings)


class GgufTokenizer(PieceTokenizer):
  """Byte-level BPE. Bytes without a token (SmolLM2 lacks 21, all rare) are dropped after merging."""

  def __init__(self, file: Path, settings: Mapping[str, Any]):
    tokens, types = settings["ggml.tokens"], settings["ggml.token_type"]
    kinds = list(zip(tokens, types, strict=True))
    pieces = [token.encode() if kind in ADDED else bytes_of(token) for token, kind in kinds]
    super().__init__(str(file), fingerprint(**settings), pieces, _control_tokens(file, settings))
    ranks = {pieces[i]: i for i, (_, kind) in enumerate(kinds) if kind not in ADDED and i != self.eot}
    merged = [ranks.get(bytes_of(merge.replace(" ", "", 1)), -1) for merge in settings["ggml.merges"]]
    if merged != sorted(merged):
      raise InputError(f"{file}: its tokens are not in the order of merging; {ADVICE}")
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


def _control_tokens(file: Path, settings: Mapping[str, Any]) -> ControlTokens:
  """The control tokens in the header. Raises InputError if there is no end-of-text token."""
  tokens = settings["ggml.tokens"]
  ids = {name: i for name in ("bos", "eos", "eot", "eom") if (i := settings.get(f"ggml.{name}_token_id")) is not None
         and i < len(tokens)}
  if "eos" not in ids:
    raise InputError(f"{file}: there is no end-of-text token: tokenizer.ggml.eos_token_id is missing")
  control = {token: i for i, (token, kind) in enumerate(zip(tokens, settings["ggml.token_type"], strict=True))
             if kind == CONTROL or i == ids["eos"]}
  bos_first = settings.get("ggml.add_bos_token", settings["ggml.pre"] in BOS_FIRST)
  return ControlTokens(control, ids["eos"], ids.get("bos") if bos_first else None,
                 tuple(ids[name] for name in ("eot", "eom") if name in ids), settings.get("chat_template"),
                 {f"{name}_token": tokens[i] for name, i in ids.items()})

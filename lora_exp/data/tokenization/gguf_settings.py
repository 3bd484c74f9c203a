"""The keys of a tokenizer in a GGUF file: those of the base's own GGUF file, or from tokenizer.json or tokenizer.model.

llama.cpp splits a text by a named pattern (`tokenizer.ggml.pre`). Only patterns that it knows can be written.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization import get_tokenizer
from lora_exp.data.tokenization.split_patterns import PATTERNS
from lora_exp.data.tokenization.tokenizer import Tokenizer
from lora_exp.data.tokenization.tokenizer_files import find_tokenizer_file
from lora_exp.runtime.gguf_header import read_header

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens
REGEX_NAMES = {PATTERNS[name]: name for name in ("llama-bpe", "qwen2")}
ADVICE = "write the merged model with format=merged, and convert it with llama.cpp's convert_hf_to_gguf.py"


def gguf_tokenizer(directory: Path, name: str, weights: str | None, vocab_size: int) -> dict[str, Any]:
  """The keys of the tokenizer `name` (see `get_tokenizer`) for a model with `vocab_size` tokens.

  `directory` has the files that `save_tokenizer` wrote. Raises InputError for a tokenizer that llama.cpp does not have.
  """
  file = find_tokenizer_file(name, weights)
  if file is not None and file.suffix == ".gguf":
    return {key: value for key, value in read_header(file).items() if key.startswith("tokenizer.") and value != []}
  tokenizer = get_tokenizer(name, weights)
  if (directory / "tokenizer.model").is_file():
    keys = _sentencepiece(directory / "tokenizer.model")
  elif (directory / "tokenizer.json").is_file():
    keys = _byte_level(json.loads((directory / "tokenizer.json").read_text(encoding="utf-8")), tokenizer)
  else:
    raise InputError(f"the tokenizer {name} has neither tokenizer.json nor tokenizer.model; {ADVICE}")
  return _padded(keys, vocab_size) | _control(tokenizer)


def _byte_level(content: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
  """The keys of a tokenizer.json with byte-level BPE."""
  model = content["model"]
  pre = _pattern_name(content.get("pre_tokenizer") or {})
  if model.get("type") != "BPE" or pre is None or model.get("byte_fallback"):
    raise InputError(f"the tokenizer splits texts in a way that GGUF files cannot name; {ADVICE}")
  added = {token["id"]: token for token in content["added_tokens"]}
  ids = {i: token for token, i in model["vocab"].items()} | {i: token["content"] for i, token in added.items()}
  tokens = [ids.get(i, f"[PAD{i}]") for i in range(max(ids) + 1)]
  kinds = [_kind(added.get(i), i in ids, ids.get(i) in tokenizer.special_tokens) for i in range(len(tokens))]
  merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
  return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
          "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": merges}


def _kind(added: Mapping[str, Any] | None, exists: bool, is_control: bool) -> int:
  """The type of a token."""
  if not exists:
    return UNUSED
  if is_control:
    return CONTROL
  if added is None:
    return NORMAL
  return CONTROL if added.get("special") else USER_DEFINED


def _pattern_name(pre_tokenizer: Mapping[str, Any]) -> str | None:
  """The name of the pattern in `tokenizer.ggml.pre`; None if it has none that we know."""
  parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
  kinds = [part.get("type") for part in parts]
  if kinds == ["ByteLevel"]:
    return "gpt-2"
  if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
    return "smollm"
  if kinds == ["Split", "ByteLevel"] and parts[0].get("behavior") == "Isolated":
    return REGEX_NAMES.get(parts[0].get("pattern", {}).get("Regex"))
  return None


def _sentencepiece(file: Path) -> dict[str, Any]:
  """The keys of a sentencepiece model, whose types of tokens have the same numbers."""
  from lora_exp.data.tokenization.sentencepiece_model import read_pieces  # needs a package of its own

  rows, adds_space = read_pieces(file)
  return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
          "tokenizer.ggml.tokens": [piece for piece, _, _ in rows],
          "tokenizer.ggml.scores": [float(score) for _, score, _ in rows],
          "tokenizer.ggml.token_type": [kind for _, _, kind in rows],
          "tokenizer.ggml.add_space_prefix": adds_space}


def _padded(keys: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
  """`keys` with unused tokens for the rest of the model's vocabulary, as llama.cpp requires."""
  missing = range(len(keys["tokenizer.ggml.tokens"]), vocab_size)
  padded = dict(keys)
  padded["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], *(f"[PAD{i}]" for i in missing)]
  padded["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], *(UNUSED for _ in missing)]
  if "tokenizer.ggml.scores" in keys:
    padded["tokenizer.ggml.scores"] = [*keys["tokenizer.ggml.scores"], *(-1000.0 for _ in missing)]
  return padded


def _control(tokenizer: Tokenizer) -> dict[str, Any]:
  """The keys of the control tokens and of the chat template."""
  bos = tokenizer.special_tokens.get(tokenizer.template_variables.get("bos_token", ""), tokenizer.bos)
  ends = [i for i in tokenizer.stops if i != tokenizer.eot]
  keys: dict[str, Any] = {"tokenizer.ggml.eos_token_id": tokenizer.eot,
                          "tokenizer.ggml.add_bos_token": tokenizer.bos is not None}
  if bos is not None:
    keys["tokenizer.ggml.bos_token_id"] = bos
  if ends:
    keys["tokenizer.ggml.eot_token_id"] = ends[0]
  if tokenizer.chat_template is not None:
    keys["tokenizer.chat_template"] = tokenizer.chat_template
  return keys

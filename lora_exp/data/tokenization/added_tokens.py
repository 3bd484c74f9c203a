"""Tokens that the settings of a tokenizer declare in addition to those of its vocabulary file.

transformers stores them in `added_tokens_decoder` of tokenizer_config.json or, in earlier versions, in
added_tokens.json. Special tokens that have no id anywhere, such as a padding token in special_tokens_map.json, follow
the last id.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
LARGEST_ID = 10**7
LARGEST_GAP = 10**5  # ids without a token


@dataclass(frozen=True)
class AddedToken:
  """A token that is matched in a text before the text is split, or, if `special`, written only by this program."""

  content: str
  special: bool
  flags: Mapping[str, bool]  # how it is matched: those of FLAGS that are given


def declared_tokens(
  file: Path, decoder: Mapping[str, Any] | None, by_content: Mapping[str, Any], special: Collection[str]
) -> dict[int, AddedToken]:
  """The tokens with an id in `added_tokens_decoder` or, if that is missing, in added_tokens.json {token: id}.

  `special` are the tokens of added_tokens.json that are special. Raises InputError with `file` for malformed entries.
  """
  tokens = {}
  if decoder is not None:
    for key, value in decoder.items():
      entry = {"content": value} if isinstance(value, str) else value
      if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or not key.isdecimal():
        raise InputError(f"{file}: added_tokens_decoder must map ids to tokens; the entry {key[:60]!r} does not")
      flags = {name: entry[name] for name in FLAGS if isinstance(entry.get(name), bool)}
      tokens[int(key)] = AddedToken(entry["content"], entry.get("special") is True, flags)
  else:
    for content, i in by_content.items():
      if not isinstance(i, int) or isinstance(i, bool) or i < 0:
        other = file.with_name("added_tokens.json")
        raise InputError(f"{other}: must map tokens to ids; the entry {content[:60]!r} does not")
      tokens[i] = AddedToken(content, content in special, {"normalized": content not in special})
  if max(tokens, default=0) > LARGEST_ID:
    raise InputError(f"{file}: the id {max(tokens)} of an added token is too large")
  return tokens


def missing_tokens(
  ids: Mapping[str, int], declared: Mapping[int, AddedToken], special: Sequence[str]
) -> dict[int, AddedToken]:
  """The tokens that the vocabulary `ids` {token: id} lacks, by id, in increasing order.

  Tokens of `declared` {id: token} have their declared ids. Tokens of `special` that are not declared get the next ids.
  """
  missing = {i: token for i, token in sorted(declared.items()) if token.content not in ids}
  known = {*ids, *(token.content for token in declared.values())}
  following = max([*ids.values(), *missing], default=-1) + 1
  for content in dict.fromkeys(special):
    if content and content not in known:
      missing[following] = AddedToken(content, True, {"normalized": False})
      following += 1
  return missing

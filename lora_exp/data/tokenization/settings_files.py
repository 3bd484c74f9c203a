"""The settings in a tokenizer's directory: added tokens, the bos and eos tokens, and the chat template."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization.added_tokens import ROLES, AddedToken, declared_tokens, missing_tokens
from lora_exp.data.tokenization.tokenizer import END_OF_TEXT, ControlTokens
from lora_exp.runtime.json_files import read_json_object

ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # tried in order if no setting names eos


@dataclass(frozen=True)
class TokenizerSettings:
  """The settings in tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json."""

  named_tokens: Mapping[str, str]  # {"bos_token": "<s>", ...}
  special: Collection[str]  # tokens marked as special
  add_bos: bool | None  # None: not stated
  add_prefix_space: bool
  ends: tuple[int, ...]  # ids that end generation
  chat_template: str | None
  tokenizer_class: str | None
  declared: Mapping[int, AddedToken]  # tokens with an id, whether or not the vocabulary has them
  ordered: Sequence[str]  # the special tokens, in the order in which they get ids
  tool_template: str | None = None  # the chat template for conversations with tools

  def missing_tokens(self, ids: Mapping[str, int]) -> dict[int, AddedToken]:
    """The tokens, by id, that the settings declare and the vocabulary `ids` {token: id} lacks."""
    return missing_tokens(ids, self.declared, self.ordered)

  def control_tokens(
    self, file: Path, ids: Mapping[str, int], special: Collection[str], bos: int | None = None, eos: int | None = None
  ) -> ControlTokens:
    """The control tokens of the tokenizer in `file`, whose vocabulary is `ids` {token: id}.

    `special` are the tokens that the file marks as special, `bos` and `eos` its first and last token of a document. The
    settings take precedence. Raises InputError if there is no end-of-text token.
    """
    tokens = {i: token for token, i in ids.items()}
    ends = tuple(i for i in self.ends if i in tokens)
    eos_token = self.named_tokens.get("eos_token")
    if eos_token is not None:
      eot = ids.get(eos_token)
    else:
      candidates = (eos, *ends, *(ids.get(token) for token in ENDS))
      eot = next((i for i in candidates if i is not None), None)
    if eot is None:
      raise InputError(f"{file}: there is no end-of-text token: tokenizer_config.json in its directory has no "
                       "eos_token")
    if self.add_bos is not None:
      bos = ids.get(self.named_tokens.get("bos_token", "")) if self.add_bos else None
    control = {token: i for token, i in ids.items() if i == eot or token in special or token in self.special}
    bos_token = {} if bos is None else {"bos_token": tokens[bos]}
    variables = {"eos_token": tokens[eot], **bos_token, **self.named_tokens}
    return ControlTokens(control, eot, bos, ends, self.chat_template, variables, self.tool_template)


def read_tokenizer_settings(folder: Path) -> TokenizerSettings:
  """Reads the settings in `folder`; files may be missing. Raises InputError if one is not JSON."""
  file = folder / "tokenizer_config.json"
  stated, roles = _optional_json(file), _optional_json(folder / "special_tokens_map.json")
  decoder = stated.get("added_tokens_decoder")
  if decoder is not None and not isinstance(decoder, dict):
    raise InputError(f"{file}: added_tokens_decoder must map ids to tokens")
  # As in transformers, the other files only add to a tokenizer_config.json that lacks added_tokens_decoder.
  settings = stated | roles if decoder is None else roles | stated
  texts = {key: _token_text(value) for key, value in settings.items() if key.endswith("_token")}
  named_tokens = {key: text for key, text in texts.items() if text is not None}
  further = _further_special_tokens(settings)
  ordered = [*(named_tokens[role] for role in ROLES if role in named_tokens), *further]
  by_content = {} if decoder is not None else _optional_json(folder / "added_tokens.json")
  named = {*named_tokens.values(), *further}
  declared = declared_tokens(file, decoder, by_content, named)
  model_end = _optional_json(folder / "config.json").get("eos_token_id")
  ends = _optional_json(folder / "generation_config.json").get("eos_token_id", model_end)
  add_bos = settings.get("add_bos_token")
  return TokenizerSettings(
    named_tokens, {*named, *(token.content for token in declared.values() if token.special)},
    add_bos if isinstance(add_bos, bool) else None, settings.get("add_prefix_space") is True,
    tuple(i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)),
    _chat_template(folder, settings), settings.get("tokenizer_class"), declared, ordered,
    _named_template(folder, settings, "tool_use"))


def _optional_json(file: Path) -> dict[str, Any]:
  """The object in a JSON file; empty if the file is missing."""
  return read_json_object(file) if file.is_file() else {}


def _token_text(value: object) -> str | None:
  """The text of a token, which is stored as a string or as a mapping with `content`."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def _further_special_tokens(settings: Mapping[str, Any]) -> list[str]:
  """The special tokens in the settings that have no role such as bos."""
  more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
  more = more.values() if isinstance(more, dict) else more
  return [text for text in map(_token_text, more) if text is not None]


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
  """The template in chat_template.jinja, chat_template.json or the setting; of several templates, `default`."""
  file = folder / "chat_template.jinja"
  if file.is_file():
    return file.read_text(encoding="utf-8")
  template = _template_setting(folder, settings)
  return template if isinstance(template, str) else _named_template(folder, settings, "default")


def _named_template(folder: Path, settings: Mapping[str, Any], name: str) -> str | None:
  """The template called `name`, if there are several."""
  file = folder / "additional_chat_templates" / f"{name}.jinja"
  if file.is_file():
    return file.read_text(encoding="utf-8")
  templates = _template_setting(folder, settings)
  if not isinstance(templates, list):
    return None
  by_name = {entry.get("name"): entry.get("template") for entry in templates if isinstance(entry, dict)}
  template = by_name.get(name)
  return template if isinstance(template, str) else None


def _template_setting(folder: Path, settings: Mapping[str, Any]) -> Any:
  """The template, or the list of templates, in chat_template.json or tokenizer_config.json."""
  return _optional_json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))

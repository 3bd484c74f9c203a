"""The settings that lie beside a tokenizer file: which tokens begin and end a document, and the chat template."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.base import END_OF_TEXT, Control
from lora_exp.runtime.json_files import read_json_object

ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # where no setting names the end


@dataclass(frozen=True)
class SidecarFiles:
  """What tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json say."""

  words: Mapping[str, str]  # {"bos_token": "<s>", ...}
  control: Collection[str]  # tokens that they call special
  add_bos: bool | None  # None: they do not say
  ends: tuple[int, ...]  # ids that end what the model generates
  chat_template: str | None
  tokenizer_class: str | None

  def resolved(self, file: Path, ids: Mapping[str, int], control: Collection[str], bos: int | None = None,
               eos: int | None = None) -> Control:
    """The control tokens of the tokenizer in `file` with `ids` {token: id}, of which `control` are special.

    `bos` and `eos` are what the file itself begins and ends a document with; the settings overrule it. Raises
    InputError if nothing ends a document.
    """
    spelt = {i: token for token, i in ids.items()}
    ends = tuple(i for i in self.ends if i in spelt)
    named = self.words.get("eos_token")
    if named is not None:
      eot = ids.get(named)
    else:
      guesses = (eos, *ends, *(ids.get(token) for token in ENDS))
      eot = next((i for i in guesses if i is not None), None)
    if eot is None:
      what = "must name its eos_token" if named is None else f"names {named!r}, which is no token of it"
      raise InputError(f"{file}: no token ends a document: tokenizer_config.json beside it {what}")
    if self.add_bos is not None:
      bos = ids.get(self.words.get("bos_token", "")) if self.add_bos else None
    tokens = {token: i for token, i in ids.items() if i == eot or token in control or token in self.control}
    words = {"eos_token": spelt[eot], **({"bos_token": spelt[bos]} if bos is not None else {}), **self.words}
    return Control(tokens, eot, bos, ends, self.chat_template, words)


def read_sidecar_files(folder: Path) -> SidecarFiles:
  """The settings in `folder`; where a file is absent it says nothing. Raises InputError for one that is no JSON."""
  settings = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
  words = {key: text for key in settings if key.endswith("_token") and (text := _token(settings[key])) is not None}
  ends = _json(folder / "generation_config.json").get("eos_token_id", _json(folder / "config.json").get("eos_token_id"))
  add_bos = settings.get("add_bos_token")
  return SidecarFiles(
    words, {*words.values(), *_listed(settings)}, add_bos if isinstance(add_bos, bool) else None,
    tuple(i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)),
    _template(folder, settings), settings.get("tokenizer_class"))


def _json(file: Path) -> dict[str, Any]:
  return read_json_object(file) if file.is_file() else {}


def _token(value: object) -> str | None:
  """A token is written as its text, or as a mapping with its `content`."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else None


def _listed(settings: Mapping[str, Any]) -> list[str]:
  """The further tokens that are called special."""
  decoder = settings.get("added_tokens_decoder")
  added = [token for token in decoder.values() if isinstance(token, dict) and token.get("special")] if decoder else []
  more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
  more = more.values() if isinstance(more, dict) else more
  return [text for token in [*added, *more] if (text := _token(token)) is not None]


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
  """chat_template.jinja, chat_template.json, or the setting: a text, or several by name of which `default` is meant."""
  if (file := folder / "chat_template.jinja").is_file():
    return file.read_text(encoding="utf-8")
  template = _json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
  if isinstance(template, list):
    named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
    template = named.get("default")
  return template if isinstance(template, str) else None

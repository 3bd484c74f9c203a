"""Prompts from files: one per line of a text file, one per line of JSON, or one per file."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError

Prompt = str | list[dict[str, Any]]  # a text, or messages with `role` and `content`
JSON_LINES, JSON_FILES = (".jsonl", ".ndjson"), (".json",)
LINE_BREAK = re.compile(r"\r\n|\n|\r")  # not those that JSON texts may contain, such as U+2028
PARTS_OF_PROMPTS = ("system", "input", "context", "history", "tools", "messages")  # in rows of training data
FORMS = 'write {"prompt": "…"}, "…" or {"messages": [{"role": "user", "content": "…"}]}'


def read_prompts(paths: str | Sequence[str]) -> list[Prompt]:
  """The prompts of `prompt_file`: of one file, or one of each file of a directory or a list.

  Raises InputError if there is none, or for text that is not UTF-8 or JSON.
  """
  given = [paths] if isinstance(paths, str) else list(paths)
  where = f"prompt_file={', '.join(given)}"
  if isinstance(paths, str) and not Path(paths).is_dir():
    prompts = _prompts_of_file(Path(paths))
  else:
    files = [file for path in given for file in _files(Path(path))]
    prompts = [prompt for file in files for prompt in _whole_file(file)]
  if not prompts:
    raise InputError(f"{where}: contains no prompt")
  return prompts


def lines_of(text: str) -> list[Prompt]:
  """A prompt per line of `text`, without empty lines."""
  return [line for line in LINE_BREAK.split(text) if line.strip()]


def text_of(content: bytes, where: str) -> str:
  """`content` as text. Raises InputError if it is not UTF-8."""
  try:
    return content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise InputError(f"{where} is not UTF-8 text: byte {error.start} cannot be read") from None


def shown_prompt(prompt: Prompt) -> str:
  """A prompt as text: of messages, the content of the last."""
  return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _files(path: Path) -> list[Path]:
  """The file `path`, or the files of the directory `path` in the order of their names, without hidden ones."""
  if not path.is_dir():
    return [path]
  return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))


def _whole_file(file: Path) -> list[Prompt]:
  """A text file as one prompt, without the line breaks at its end; the prompts of a JSON file."""
  if file.suffix.lower() in (*JSON_LINES, *JSON_FILES):
    return _prompts_of_file(file)
  text = text_of(file.read_bytes(), f"prompt_file={file}").rstrip("\r\n")
  return [text] if text.strip() else []


def _prompts_of_file(file: Path) -> list[Prompt]:
  where = f"prompt_file={file}"
  text = text_of(file.read_bytes(), where)
  if file.suffix.lower() in JSON_LINES:
    lines = [(f"{where}, line {n}", line) for n, line in enumerate(LINE_BREAK.split(text), 1) if line.strip()]
    return [_prompt(_json(line, place), place) for place, line in lines]
  if file.suffix.lower() in JSON_FILES:
    value = _json(text, where)
    items = value if isinstance(value, list) and not _is_messages(value) else [value]
    return [_prompt(item, f"{where}, prompt {n}") for n, item in enumerate(items, 1)]
  return lines_of(text)


def _json(text: str, where: str) -> Any:
  try:
    return json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{where}: is not JSON ({error}); {FORMS}") from None


def _prompt(value: Any, where: str) -> Prompt:
  """The prompt in a JSON value. Raises InputError if it is none."""
  if isinstance(value, dict):
    key = "prompt" if "prompt" in value else "messages"
    others = [name for name in PARTS_OF_PROMPTS if name != key and value.get(name)]
    if others:
      raise InputError(f"{where}: {others[0]!r} is not read beside {key!r}; {FORMS}")
    value = value.get(key)
  if isinstance(value, str) and value.strip():
    return value
  if _is_messages(value):
    messages: list[dict[str, Any]] = value
    return messages
  raise InputError(f"{where}: is no prompt; {FORMS}")


def _is_messages(value: Any) -> bool:
  """Whether `value` is a list of messages with text."""
  return isinstance(value, list) and bool(value) and all(
    isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
    for item in value
  )

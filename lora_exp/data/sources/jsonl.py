"""A file of JSON lines: prompts and responses."""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.sources.source import Document


@dataclass(frozen=True)
class JsonLines(FileSource):
  """One JSON object per line: `prompt_field` is the prompt, `response_field` the text to learn."""

  name = "jsonl"
  suffixes = (".jsonl", ".ndjson")
  content = "a file of JSON lines"
  prompt_separator = ""

  prompt_field: str = "prompt"
  response_field: str = "response"

  def check(self) -> Iterator[str]:
    for setting in ("prompt_field", "response_field"):
      if not getattr(self, setting):
        yield self.problem(setting, "must be the name of a field")

  def check_inputs(self) -> Iterator[str]:
    problems = list(super().check_inputs())
    yield from problems
    if not problems:  # a field that no line has is said before anything is built
      try:
        next(self.documents(), None)
      except InputError as error:
        yield from error.problems

  def documents(self) -> Iterator[Document]:
    read = key = 0
    with self.file.open("rb") as file:
      for number, line in enumerate(file, 1):
        start, read = read, read + len(line)
        if not line.strip():
          continue
        text = self.decode(line, number, start)
        try:
          prompt, response = self._texts(text)
        except InputError as error:
          raise InputError(f"{self.file}, line {number}: {error}") from error
        yield Document(key, response, prompt, read)
        key += 1

  def _texts(self, line: str) -> tuple[str, str]:
    """(prompt, response) of one line."""
    try:
      record = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}") from error
    except RecursionError as error:
      raise InputError("JSON nested too deeply") from error
    if not isinstance(record, dict):
      raise InputError(f"expected a JSON object, got {type(record).__name__}")
    return text_field(record, self.prompt_field), text_field(record, self.response_field)


def text_field(record: dict[str, object], name: str) -> str:
  """The text of the field `name`. Raises InputError if it is missing, not a string, or not valid Unicode."""
  if name not in record:
    raise InputError(f"there is no field {name!r}; the fields are {', '.join(map(repr, record)) or 'none'}"
                     f"{did_you_mean(name, record)} (data.prompt_field and data.response_field name them)")
  value = record[name]
  if not isinstance(value, str):
    raise InputError(f"the field {name!r} has type {type(value).__name__}, expected a string")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"the field {name!r} contains an unpaired surrogate at character {error.start}") from error
  return value

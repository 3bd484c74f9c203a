"""Reads untrusted JSON files; errors are one sentence."""

import json
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError


def read_json_object(file: Path) -> dict[str, Any]:
  """Reads the object in a JSON file. Raises InputError if the file cannot be read, or as `parse_json_object` does."""
  try:
    content = file.read_bytes()
  except OSError as error:
    raise InputError(f"{file}: cannot be read as JSON: {error.strerror}") from error
  return parse_json_object(content, file)


def parse_json_object(content: bytes, where: Path | str) -> dict[str, Any]:
  """Parses the JSON object in UTF-8 `content`; `where` names it in error messages.

  Raises InputError for invalid JSON, other values, NaN and infinite numbers, and duplicate keys.
  """
  try:
    value = json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
  except RecursionError:
    raise InputError(f"{where}: cannot be read as JSON: it is nested too deeply") from None
  except ValueError as error:
    raise InputError(f"{where}: cannot be read as JSON: {error}") from None
  if not isinstance(value, dict):
    raise InputError(f"{where}: must contain a JSON object")
  return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  values: dict[str, Any] = {}
  for key, value in pairs:
    if key in values:
      raise ValueError(f"duplicate key {key[:60]!r}")
    values[key] = value
  return values


def _refuse_constant(text: str) -> None:
  raise ValueError(f"{text} is not a number in JSON")

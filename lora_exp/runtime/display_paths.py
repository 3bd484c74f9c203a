"""Paths formatted for messages, so that users can copy them into the next command."""

import os
from pathlib import Path

from lora_exp.config.override_grammar import typed


def display_path(path: Path) -> str:
  """`path` relative to the working directory if it is inside it, else unchanged."""
  return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def typed_path(key: str, path: Path) -> str:
  """The override `key=path` as typed in a shell, with the path as in `display_path`."""
  return typed(key, display_path(path))


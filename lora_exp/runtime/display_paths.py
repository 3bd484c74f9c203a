"""Paths formatted for messages, so that users can copy them into the next command."""

import os
from pathlib import Path


def display_path(path: Path) -> str:
  """`path` relative to the working directory if it is inside it, else unchanged."""
  return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

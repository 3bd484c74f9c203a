"""Paths as messages show them, so that a person can copy them into the next command."""

import os
from pathlib import Path


def display_path(path: Path) -> str:
  """`path` relative to the working directory if it lies in it, else as it is."""
  return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)

"""Sizes in bytes: parsing of texts such as 20GB, formatting, and sizes of directories."""

import os
import re
from pathlib import Path

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(value: object) -> int:
  """The bytes of a number or of a text such as 100MB or '1.5 GB', as `config.check` allows them."""
  match = re.fullmatch(r"([\d.]+) ?(\w*)", str(value))
  assert match is not None
  return int(float(match[1]) * UNITS[match[2].upper()])


def size_text(size: float) -> str:
  """A size in the largest unit that gives at least 1: '12.3 MB'."""
  for unit in ("TB", "GB", "MB", "KB"):
    if size >= UNITS[unit]:
      return f"{size / UNITS[unit]:.3g} {unit}"
  return f"{size:.0f} bytes"


def size_of(path: Path) -> int:
  """The bytes of a file, or of all files below a directory. Files that disappear meanwhile count 0."""
  if not path.is_dir():
    return _file_size(path)
  return sum(_file_size(Path(parent) / name) for parent, _, names in os.walk(path) for name in names)


def _file_size(path: Path) -> int:
  try:
    return path.lstat().st_size
  except OSError:
    return 0

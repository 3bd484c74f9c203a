"""The settings in the header of a GGUF file. Reading them takes 0.1 s; the package gguf needs 3 s.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)


def read_header(file: Path) -> dict[str, Any]:
  """Reads {key: number, string, or list of them}. Raises InputError if `file` is not a GGUF file or is truncated."""
  with file.open("rb") as opened:
    if opened.read(4) != b"GGUF":
      raise InputError(f"{file} is not a GGUF file")
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
      try:
        return _Reader(content).header()
      except (struct.error, UnicodeDecodeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged or truncated: {error}") from error


class _Reader:
  """Reads values one after another; GGUF is little-endian."""

  def __init__(self, content: mmap.mmap):
    self.content, self.place = content, 4

  def header(self) -> dict[str, Any]:
    version, _, count = self.number("I"), self.number("Q"), self.number("Q")
    if version not in VERSIONS:
      raise ValueError(f"version {version} is not known")
    return {self.string(): self.value(self.number("I")) for _ in range(count)}

  def number(self, kind: str) -> Any:
    [value] = struct.unpack_from(f"<{kind}", self.content, self.place)
    self.place += struct.calcsize(f"<{kind}")
    return value

  def string(self) -> str:
    length = self.number("Q")
    text = self.content[self.place : self.place + length]
    if len(text) < length:
      raise ValueError("a string extends past the end of the file")
    self.place += length
    return text.decode()

  def value(self, kind: int) -> Any:
    if kind == STRING:
      return self.string()
    if kind != ARRAY:
      return self.number(NUMBERS[kind])
    inner, count = self.number("I"), self.number("Q")
    if inner not in NUMBERS:
      return [self.value(inner) for _ in range(count)]
    kinds = f"<{count}{NUMBERS[inner]}"
    values = struct.unpack_from(kinds, self.content, self.place)
    self.place += struct.calcsize(kinds)
    return list(values)

"""The settings and tensor entries in the header of a GGUF file. Reading takes 0.1 s; the package gguf needs 3 s.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct's
STRING, ARRAY = 8, 9
VERSIONS = (2, 3)
FLOAT32 = 0  # the type of a tensor
MOST_AXES = 8
ALIGNMENT = 32  # of the tensors, in bytes, unless general.alignment states it


@dataclass(frozen=True)
class GgufTensor:
  """A tensor's entry in the header."""

  shape: tuple[int, ...]  # in row-major order, the reverse of that in the file
  kind: int  # GGUF's type number
  offset: int  # bytes after the header


@dataclass(frozen=True)
class GgufHeader:
  """The settings by key, and the entries of the tensors by name."""

  file: Path
  settings: dict[str, Any]
  tensors: dict[str, GgufTensor]
  end: int  # of the header, in bytes

  def read_floats(self, name: str) -> Sequence[float]:
    """The values of a one-dimensional float32 tensor. Raises InputError for other tensors and truncated files."""
    tensor = self.tensors[name]
    if tensor.kind != FLOAT32 or len(tensor.shape) != 1:
      raise InputError(f"{self.file}: {name} must be a vector of float32 values")
    alignment = self.settings.get("general.alignment", ALIGNMENT)
    size = self.file.stat().st_size
    if type(alignment) is not int or alignment < 1 or tensor.offset > size or 4 * tensor.shape[0] > size:
      raise InputError(f"{self.file} is damaged: the place of {name} is outside of the file")
    start = math.ceil(self.end / alignment) * alignment + tensor.offset
    with self.file.open("rb") as opened:
      opened.seek(start)
      content = opened.read(4 * tensor.shape[0])
    if len(content) != 4 * tensor.shape[0]:
      raise InputError(f"{self.file} is damaged or truncated: {name} extends past the end of the file")
    return struct.unpack(f"<{tensor.shape[0]}f", content)


def read_header(file: Path) -> dict[str, Any]:
  """Reads {key: number, string, or list of them}. Raises InputError if `file` is not a GGUF file or is truncated."""
  return read_gguf(file, tensors=False).settings


def read_gguf(file: Path, tensors: bool = True) -> GgufHeader:
  """Reads the header of `file`, with the entries of the tensors if `tensors`. Raises InputError as `read_header`."""
  with file.open("rb") as opened:
    if opened.read(4) != b"GGUF":
      raise InputError(f"{file} is not a GGUF file")
    with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
      try:
        return _Reader(content).header(file, tensors)
      except (struct.error, UnicodeDecodeError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is damaged or truncated: {error}") from error


class _Reader:
  """Reads values one after another; GGUF is little-endian."""

  def __init__(self, content: mmap.mmap):
    self.content, self.place = content, 4

  def header(self, file: Path, tensors: bool) -> GgufHeader:
    version, tensor_count, count = self.number("I"), self.number("Q"), self.number("Q")
    if version not in VERSIONS:
      raise ValueError(f"unknown version {version}")
    settings = {self.string(): self.value(self.number("I")) for _ in range(count)}
    entries = {self.string(): self.tensor() for _ in range(tensor_count)} if tensors else {}
    return GgufHeader(file, settings, entries, self.place)

  def tensor(self) -> GgufTensor:
    axes = self.number("I")
    if axes > MOST_AXES:
      raise ValueError(f"a tensor has {axes} axes")
    shape = tuple(self.number("Q") for _ in range(axes))[::-1]
    return GgufTensor(shape, self.number("I"), self.number("Q"))

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

"""Text files of documents."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.file_content import decoded, open_data
from lora_exp.data.formats.file_formats import FORMATS, TEXT
from lora_exp.data.formats.row_formats import find_format
from lora_exp.data.sources.file_source import FileSource, left_out_files
from lora_exp.data.sources.source import covered_by_digest, example_facts

SEPARATOR = b"<|endoftext|>"
LONGEST = 2**20  # bytes of a document; a longer one is cut at a newline
SECTIONS = 10  # sections per held-out one, if there are too few documents
BOUNDARIES = {  # where a text is divided: at the first of these that gives enough sections
  "paragraphs": re.compile(rb"\n[ \t\r]*\n\s*"),
  "lines": re.compile(rb"\n"),
  "sentences": re.compile(rb"(?<=[.!?])\s+"),
  "words": re.compile(rb"\s+"),
}  # fmt: skip


class Piece(NamedTuple):
  """A part of a text file: a document, or a section of one."""

  path: Path
  content: bytes
  line: int  # of its first byte, from 1
  offset: int  # of its first byte in the file
  read: int  # bytes of all files read so far


@dataclass(frozen=True)
class TextFiles:
  """UTF-8 text files with `<|endoftext|>` between documents. Documents longer than 1 MiB are split at newlines.

  One of `every` documents is held out; None: none of them. If there are fewer than `every` documents, they are divided
  into sections, at blank lines if possible.
  """

  files: tuple[Path, ...]
  every: int | None

  @cached_property
  def boundary(self) -> str | None:
    """The name in BOUNDARIES at which documents are divided; None if they are not divided."""
    if self.every is None or sum(1 for _ in islice(self._documents(), self.every)) == self.every:
      return None
    pieces = list(self._documents())
    for name, pattern in BOUNDARIES.items():
      if sum(len(_units(piece.content, pattern)) for piece in pieces) >= self.every:
        return name
    return None

  def pieces(self) -> Iterator[Piece]:
    """Every document in order, or its sections; blank ones are left out."""
    if self.boundary is None:
      yield from self._documents()
      return
    assert self.every is not None
    pattern, pieces = BOUNDARIES[self.boundary], list(self._documents())
    size = sum(len(piece.content) for piece in pieces) // (SECTIONS * self.every)
    sections = [section for piece in pieces for section in _sections(piece, pattern, size)]
    if len(sections) < self.every:  # too many short units were joined
      sections = [section for piece in pieces for section in _sections(piece, pattern, 0)]
    yield from sections

  def documents(self, first_key: int = 0) -> Iterator[Document]:
    """The pieces as documents. Raises InputError if a file is not UTF-8."""
    for key, piece in enumerate(self.pieces(), first_key):
      text = decoded(piece.content, str(piece.path), piece.line, piece.offset)
      yield Document(key, text, read=piece.read, where=f"{piece.path.name}, line {piece.line}")

  def facts(self) -> dict[str, object]:
    """How documents are divided and the first of them, for the table before training."""
    divided = f"held out by {self.boundary}, because there are fewer than {self.every} documents"
    first = next(self.documents(), None)
    return {**({"sections": divided} if self.boundary else {}), **(example_facts(first) if first else {})}

  def _documents(self) -> Iterator[Piece]:
    before = 0
    for path in self.files:
      offset, line = 0, 1
      with open_data(path) as data:
        for content, skipped in split_documents(data.stream):
          if content.decode(errors="replace").removeprefix("\ufeff" if offset == 0 else "").strip():
            yield Piece(path, content, line, offset, before + data.read)
          offset += len(content) + skipped
          line += content.count(b"\n")
      before += path.stat().st_size


@dataclass(frozen=True)
class Text(FileSource):
  """Text files with `<|endoftext|>` between documents, see `TextFiles`."""

  name = "text"
  suffixes = (".txt",)
  content = "a text file (TinyStories, for example), documents separated by <|endoftext|>"
  text_only = True

  eval_fraction: float = covered_by_digest(0.1)  # the key of the rows contains it in another form (`every`)

  @property
  def text_files(self) -> TextFiles:
    """The files, and how their documents are found."""
    return TextFiles(self.data_files.files, held_out_share(self.eval_path, self.eval_fraction))

  def held_out(self) -> "Text | None":
    """The source of `eval_path`, in which nothing is divided; None if it is not set."""
    return self.replace(path=self.eval_path, eval_path=None, eval_fraction=0.0) if self.eval_path else None

  def documents(self) -> Iterator[Document | Skipped]:
    yield from left_out_files(self.data_files)
    yield from self.text_files.documents()

  def facts(self) -> dict[str, object]:
    found = find_format(self.file)
    instead = "" if found == TEXT else f"; it looks like {FORMATS[found].words}, whose rows data=files reads"
    return {"data": self.label, "format": f"plain text{instead}", **self.overlap(), **self.text_files.facts()}


def held_out_share(eval_path: object, eval_fraction: float) -> int | None:
  """n, if one of n documents is held out. None if eval_path is set, or if the fraction is not between 0 and 0.5."""
  return round(1 / eval_fraction) if not eval_path and 0 < eval_fraction <= 0.5 else None


def split_documents(file: IO[bytes], block: int = 2**20) -> Iterator[tuple[bytes, int]]:
  """Yields (document, bytes of the separator after it), reading `block` bytes at a time.

  Memory holds one document and one block, whatever the size of the file.
  """
  rest = b""
  for read in iter(partial(file.read, block), b""):
    *complete, rest = (rest + read).split(SEPARATOR)
    for document in complete:
      *pieces, last = _cut(document, LONGEST)
      yield from ((piece, 0) for piece in pieces)
      yield last, len(SEPARATOR)
    *pieces, rest = _cut(rest, LONGEST + len(SEPARATOR))  # its end may be part of a separator
    yield from ((piece, 0) for piece in pieces)
  yield from ((piece, 0) for piece in _cut(rest, LONGEST))


def _cut(document: bytes, keep: int) -> list[bytes]:
  """Splits off pieces of at most LONGEST bytes until at most `keep` bytes remain, which are the last piece."""
  pieces, start = [], 0
  while len(document) - start > keep:
    end = document.rfind(b"\n", start, start + LONGEST) + 1
    if end == 0:
      end = start + LONGEST
      while document[end] & 0xC0 == 0x80 and end > start + LONGEST - 3:  # not inside a character
        end -= 1
    pieces.append(document[start:end])
    start = end
  return [*pieces, document[start:]]


def _units(content: bytes, pattern: re.Pattern[bytes]) -> list[bytes]:
  """`content` divided after each match of `pattern`. No unit is blank, and joined they are `content`."""
  units, start = list[bytes](), 0
  for match in pattern.finditer(content):
    if content[start : match.end()].strip():
      units.append(content[start : match.end()])
      start = match.end()
  rest = content[start:]
  if rest.strip() or not units:
    return [*units, rest]
  return [*units[:-1], units[-1] + rest]


def _sections(piece: Piece, pattern: re.Pattern[bytes], size: int) -> Iterator[Piece]:
  """Sections of at least `size` bytes, except the last, that end at a boundary."""
  line, offset, section = piece.line, piece.offset, b""
  for unit in _units(piece.content, pattern):
    section += unit
    if len(section) >= size:
      yield piece._replace(content=section, line=line, offset=offset)
      line, offset, section = line + section.count(b"\n"), offset + len(section), b""
  if section.strip():
    yield piece._replace(content=section, line=line, offset=offset)

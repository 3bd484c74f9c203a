"""A text file of documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.sources.source import Document

SEPARATOR = b"<|endoftext|>"
LONGEST = 2**20  # bytes of a document; a longer one is cut at a newline


@dataclass(frozen=True)
class Text(FileSource):
  """UTF-8 text with `<|endoftext|>` between documents. Documents longer than 1 MiB are split at newlines."""

  name = "text"
  suffixes = (".txt",)
  content = "a text file (TinyStories, for example), documents separated by <|endoftext|>"

  def documents(self) -> Iterator[Document]:
    offset, line, key = 0, 1, 0
    with self.file.open("rb") as file:
      for content, skipped in split_documents(file):
        text = self.decode(content, line, offset)
        offset += len(content) + skipped
        line += content.count(b"\n")
        if text.strip():
          yield Document(key, text, read=offset)
          key += 1


def split_documents(file: IO[bytes], block: int = 2**20) -> Iterator[tuple[bytes, int]]:
  """Yields (document, bytes of the separator after it), reading `block` bytes at a time.

  Memory holds one document and one block, whatever the size of the file.
  """
  rest = b""
  while read := file.read(block):
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

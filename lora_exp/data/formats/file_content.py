"""The kind of a file, from its first bytes, and the decompression of data files."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lora_exp.config.errors import InputError

MOST_TIMES, MOST_EXPANDED = 200, 10**8  # compressed text has a tenth of its size; a smaller file may have less
BUFFER = 2**17  # bytes decompressed at once
HEAD = 4096  # first bytes, from which the kind of a file is found
INSTALL = "pip install 'lora_exp[datasets]'"
UNPACK = "unpack it and give the files"
MODEL = "give it as model.weights"
# Kinds of files that are not read: (offset, bytes at the offset, what the file is, what to do).
FOREIGN: tuple[tuple[int, bytes, str, str], ...] = (
  (30, b"[Content_Types].xml", "an Office document (.xlsx, .docx)", "export it as CSV or text"),
  (30, b"mimetype", "an OpenDocument file or an e-book", "export it as CSV or text"),
  (0, b"PK\x03\x04", "a zip archive", UNPACK),
  (0, b"PK\x05\x06", "an empty zip archive", UNPACK),
  (257, b"ustar", "a tar archive", UNPACK),
  (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
  (0, b"Rar!\x1a\x07", "a rar archive", UNPACK),
  (0, b"\x04\x22\x4d\x18", "compressed with lz4", "compress it with gzip or zstd"),
  (0, b"version https://git-lfs.github.com/spec", "a Git LFS pointer and not the data", "run git lfs pull"),
  (0, b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
  (0, b"%PDF", "a PDF document", "convert it to text"),
  (0, b"\xd0\xcf\x11\xe0", "an old Office document", "export it as CSV or text"),
  (0, b"{\\rtf", "an RTF document", "convert it to text"),
  (0, b"\x93NUMPY", "a NumPy array", "write its rows as JSON lines"),
  (0, b"\x89HDF", "an HDF5 file", "write its rows as Parquet or JSON lines"),
  (0, b"ORC", "an ORC file", "write it as Parquet"),
  (0, b"Obj\x01", "an Avro file", "write it as Parquet or JSON lines"),
  (0, b"GGUF", "a GGUF model", MODEL),
  (0, b"\x7fELF", "a program", "give a data file"),
  (0, b"\x89PNG", "an image", "only text is read"),
  (0, b"\xff\xd8\xff", "an image", "only text is read"),
  (0, b"GIF8", "an image", "only text is read"),
  (0, b"RIFF", "sound or video", "only text is read"),
  (0, b"\x80\x04\x95", "a Python pickle, which can run code when it is read", "write its rows as JSON lines"),
  (0, b"\x80\x05\x95", "a Python pickle, which can run code when it is read", "write its rows as JSON lines"),
  (0, b"\x80\x02", "a Python pickle, which can run code when it is read", "write its rows as JSON lines"),
  (0, b"\xff\xfe", "text in UTF-16", "convert it to UTF-8"),
  (0, b"\xfe\xff", "text in UTF-16", "convert it to UTF-8"),
)
COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
TABLES = (b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")  # the first bytes of Parquet and Arrow files


def content_problem(setting: str, path: Path) -> str | None:
  """The problem of a file that does not contain data, or None."""
  try:
    with open_data(path) as data:
      head = data.stream.read(HEAD)
  except InputError as error:
    return f"{setting}={path}: {str(error).removeprefix(f'{path}: ')}"
  problem = foreign_content(head)
  return f"{setting}={path}: {problem}" if problem else None


def foreign_content(head: bytes) -> str | None:
  """What is wrong with a file that begins with `head`, such as 'is a zip archive; unpack it …'; None for data."""
  for offset, magic, words, advice in FOREIGN:
    if head[offset:].startswith(magic):
      return f"is {words}; {advice}"
  if head.startswith(TABLES):
    return None
  if compression_of(head) is not None:
    return f"is compressed twice (inside with {compression_of(head)}); decompress it once"
  if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
    return "is an HTML page, perhaps an error page that was saved instead of the data; download it again"
  if _is_safetensors(head):
    return f"is a file of tensors (safetensors); {MODEL}"
  if len(head) > 64 and not head.strip(b"\x00"):
    return "contains only zero bytes; copy the file again"
  if b"\x00" in head and not _is_utf8(head):
    return "is a binary file of unknown kind; give JSON lines, CSV, Parquet, Arrow or plain text"
  return None


def _is_utf8(head: bytes) -> bool:
  """Whether the first bytes of a file are UTF-8; the last character may be cut off."""
  try:
    codecs.getincrementaldecoder("utf-8")().decode(head)
  except UnicodeDecodeError:
    return False
  return True


def _is_safetensors(head: bytes) -> bool:
  """Whether a file begins with the length of a JSON header and the header."""
  return head[8:10] in (b'{"', b"{}") and 0 < int.from_bytes(head[:8], "little") < 2**32


@dataclass(frozen=True)
class DataStream:
  """An open file, decompressed."""

  stream: IO[bytes]  # of the decompressed content
  raw: IO[bytes]  # of the file on disk

  @property
  def read(self) -> int:
    """Bytes of the file on disk read so far."""
    return self.raw.tell()


class _MeasuredStream(io.RawIOBase):
  """What `stream` decompresses from the file `raw`. Raises InputError when it is many times the size of the file."""

  def __init__(self, stream: Any, raw: IO[bytes], path: Path):
    self.stream, self.raw, self.path, self.size = stream, raw, path, 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    count: int = self.stream.readinto(buffer)
    self.size += count
    if self.size > MOST_EXPANDED and self.size > MOST_TIMES * self.raw.tell():
      raise InputError(f"{self.path}: more than {MOST_TIMES} times as large when decompressed, like a file made to "
                       "fill the memory; if the data is real, decompress it first")
    return count


@contextmanager
def open_data(path: Path) -> Iterator[DataStream]:
  """Opens a file and decompresses it if necessary. Raises InputError if its compressed data is damaged or truncated."""
  with path.open("rb") as raw:
    compression = compression_of(raw.peek(8))
    try:
      if compression is None:
        yield DataStream(raw, raw)
      else:
        with _decompressor(compression)(raw) as stream:
          yield DataStream(io.BufferedReader(_MeasuredStream(stream, raw, path), BUFFER), raw)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
      raise _damaged(path, compression, error) from error
    except OSError as error:
      if compression is None or error.errno is not None:
        raise
      raise _damaged(path, compression, error) from error


def compression_of(head: bytes) -> str | None:
  """The name of the compression of a file that begins with `head`, or None."""
  return next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), None)


def _damaged(path: Path, compression: str | None, error: Exception) -> InputError:
  return InputError(f"{path}: its {compression} data is damaged or truncated ({error}); copy the file again")


def _decompressor(compression: str) -> Callable[[Any], Any]:
  openers: dict[str, Callable[[Any], Any]] = {
    "gzip": _gzip_stream, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile, "zstd": _zstd_stream,
  }  # fmt: skip
  return openers[compression]


def _gzip_stream(raw: IO[bytes]) -> gzip.GzipFile:
  return gzip.GzipFile(fileobj=raw)


def _zstd_stream(raw: IO[bytes]) -> IO[bytes]:
  """The decompressed stream of a .zst file."""
  pyarrow = import_pyarrow("a .zst file")
  return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))


def import_pyarrow(purpose: str) -> Any:
  """Imports pyarrow. Raises an InputError that names the extra if it is not installed."""
  try:
    import pyarrow
  except ImportError as error:
    raise InputError(f"{purpose} is read by pyarrow, which is not installed: {INSTALL}") from error
  return pyarrow


def decoded(content: bytes, label: str, line: int, offset: int) -> str:
  """Decodes `content`, which starts in line `line` (from 1) at byte `offset` of the file `label`.

  Raises InputError with line and byte if it is not UTF-8. A byte order mark at the start of the file is dropped.
  """
  try:
    text = content.decode()
  except UnicodeDecodeError as error:
    at = line + content.count(b"\n", 0, error.start)
    raise InputError(f"{label}, line {at}: byte {offset + error.start} is not UTF-8 ({error.reason}); "
                     "convert the file to UTF-8") from error
  return text.removeprefix("\ufeff") if offset == 0 else text

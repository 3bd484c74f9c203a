"""The base class of sources that read the file `data.path`: settings, checks, digest and decoding."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from lora_exp.config.errors import InputError
from lora_exp.data.sources.source import TextSource, covered_by_digest
from lora_exp.runtime.files import file_problem


@dataclass(frozen=True)
class FileSource(TextSource):
  """A source that reads one file, and optionally the held-out documents from another file."""

  content: ClassVar[str]  # description for the message when no file is given: "a file of JSON lines"
  suffixes: ClassVar[tuple[str, ...]] = ()  # usual suffixes of such files, for suggestions

  path: str | None = covered_by_digest()
  eval_path: str | None = covered_by_digest(None)

  @property
  def file(self) -> Path:
    """The path of the file."""
    assert self.path, "check_inputs refuses a source without a path"
    return Path(self.path).expanduser()

  @property
  def label(self) -> str:
    return str(self.file)

  @property
  def size(self) -> int:
    return self.file.stat().st_size

  def check_inputs(self) -> Iterator[str]:
    if not self.path:
      yield self.problem("path", f"give data.path=FILE, {self.content}")
    else:
      yield from filter(None, [file_problem("data.path", self.path)])
    if self.eval_path:
      yield from filter(None, [file_problem("data.eval_path", self.eval_path)])

  def held_out(self) -> Self | None:
    """The source of `eval_path`, or None if it is not set."""
    return self.replace(path=self.eval_path, eval_path=None) if self.eval_path else None

  def digest(self) -> str:
    """SHA-256 (hex) of the file's content."""
    with self.file.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  def decode(self, content: bytes, line: int, offset: int) -> str:
    """Decodes `content`, which starts in `line` (from 1) at byte `offset` of the file.

    Raises InputError with line and byte if it is not UTF-8. A byte order mark at the start of the file is dropped.
    """
    try:
      text = content.decode()
    except UnicodeDecodeError as error:
      at = line + content.count(b"\n", 0, error.start)
      raise InputError(f"{self.file}, line {at}: byte {offset + error.start} is not UTF-8 ({error.reason}); "
                       "convert the file to UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text

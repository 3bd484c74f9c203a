"""What sources that read the file `data.path` share: its settings, its checks, its digest, and its text."""

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
  """A source that reads one file, and held-out documents from another where there is one."""

  content: ClassVar[str]  # what the file is, for the message where none is given: "a file of JSON lines"
  suffixes: ClassVar[tuple[str, ...]] = ()  # of such files, for suggestions

  path: str | None = covered_by_digest()
  eval_path: str | None = covered_by_digest(None)

  @property
  def file(self) -> Path:
    """The file that is read."""
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
    """The same source that reads `eval_path`, if that is given."""
    return self.replace(path=self.eval_path, eval_path=None) if self.eval_path else None

  def digest(self) -> str:
    """SHA-256 (hex) of the file's content."""
    with self.file.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()

  def decode(self, content: bytes, line: int, offset: int) -> str:
    """The text of `content`, which begins in `line` (from 1) at byte `offset` of the file.

    Raises InputError, with line and byte, where it is not UTF-8. A byte order mark at the file's beginning is dropped.
    """
    try:
      text = content.decode()
    except UnicodeDecodeError as error:
      at = line + content.count(b"\n", 0, error.start)
      raise InputError(f"{self.file}, line {at}: byte {offset + error.start} is not UTF-8 ({error.reason}); "
                       "convert the file to UTF-8") from error
    return text.removeprefix("\ufeff") if offset == 0 else text

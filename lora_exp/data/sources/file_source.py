"""The base class of sources that read the files of `data.path`: settings, checks, digest and decoding."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from lora_exp.config.errors import InputError
from lora_exp.data.documents import Skipped
from lora_exp.data.formats.data_files import DataFiles, find_files
from lora_exp.data.formats.file_content import content_problem, decoded, open_data
from lora_exp.data.sources.source import TextSource, covered_by_digest
from lora_exp.runtime.cache import fingerprint


@dataclass(frozen=True)
class FileSource(TextSource):
  """A source that reads files, and optionally reads the held-out documents from other files.

  A path is a file, a pattern (`*.txt`), a directory, or a list of these.
  """

  content: ClassVar[str]  # description for the message when no file is given: "a file of JSON lines"
  suffixes: ClassVar[tuple[str, ...]] = ()  # usual suffixes of such files, for suggestions
  text_only: ClassVar[bool] = False  # whether only plain text files are read from a directory

  path: Any = covered_by_digest()
  eval_path: Any = covered_by_digest(None)

  @cached_property
  def data_files(self) -> DataFiles:
    """The files to read. Raises InputError with every path that cannot be read."""
    return find_files("data.path", self.path, self.wanted_split, self.text_only)

  @property
  def wanted_split(self) -> str | None:
    """The split to read from a directory with several."""
    return None

  @property
  def file(self) -> Path:
    """The path of the file, or of the first one."""
    assert self.path, "check_inputs refuses a source without a path"
    return self.data_files.files[0]

  @property
  def label(self) -> str:
    count = len(self.data_files.files)
    return str(self.file) if count == 1 else f"data.path={self.path} ({count} files)"

  @property
  def size(self) -> int | None:
    return sum(file.stat().st_size for file in self.data_files.files)

  @property
  def counts_rest(self) -> bool:
    return True

  def check_inputs(self) -> Iterator[str]:
    if not self.path:
      yield self.problem("path", f"give data.path=FILE, {self.content}")
    else:
      yield from self.file_problems("data.path", self.path, self.wanted_split)
    if self.eval_path:
      yield from self.file_problems("data.eval_path", self.eval_path, None)

  def file_problems(self, setting: str, value: Any, split: str | None) -> Iterator[str]:
    """The problems of the files of a setting: files that do not exist or do not contain data."""
    try:
      found = find_files(setting, value, split, self.text_only)
    except InputError as error:
      yield from error.problems
      return
    yield from filter(None, (content_problem(setting, file) for file in found.files))

  def held_out(self) -> Self | None:
    """The source of `eval_path`, or None if it is not set."""
    return self.replace(path=self.eval_path, eval_path=None) if self.eval_path else None

  def digest(self) -> str:
    """SHA-256 (hex) of the content of the files."""
    return files_digest(self.data_files.files)

  def overlap(self) -> dict[str, object]:
    """Entries for the table before training: files that are read twice, or both held out and trained on."""
    learned = self.data_files.files
    facts: dict[str, object] = {}
    copies = _copies(learned, learned)
    if copies:
      facts["data.path"] = f"{copies[0][1]} is a copy of {copies[0][0]}, so its rows are learned twice"
    if not self.eval_path:
      return facts
    try:
      held_out = find_files("data.eval_path", self.eval_path, None, self.text_only).files
    except InputError:  # a dataset and not files
      return facts
    both = [path for path in held_out if path.resolve() in {other.resolve() for other in learned}]
    both += [copy for _, copy in _copies(learned, held_out)]
    if both:
      facts["data.eval_path"] = f"{both[0]} is also trained on, so its loss is not a held-out loss"
    return facts

  def texts(self) -> Iterator[str]:
    """The text of each file. Raises InputError with line and byte if one is not UTF-8."""
    for path in self.data_files.files:
      with open_data(path) as data:
        yield decoded(data.stream.read(), str(path), 1, 0)


def _copies(files: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, Path]]:
  """The pairs of a file in `files` and another in `others` with the same content. Only files of equal size are read."""
  sizes = Counter(path.stat().st_size for path in {*files, *others})
  digests = {path: files_digest([path]) for path in {*files, *others} if sizes[path.stat().st_size] > 1}
  first: dict[str, Path] = {}
  for path in files:
    if path in digests:
      first.setdefault(digests[path], path)
  found = [(first.get(digests[path]), path) for path in others if path in digests]
  return [(original, path) for original, path in found if original is not None and original != path]


def files_digest(paths: Sequence[Path]) -> str:
  """SHA-256 (hex) of the content of one file, or of the digests of several."""
  digests = []
  for path in paths:
    with path.open("rb") as file:
      digests.append(hashlib.file_digest(file, "sha256").hexdigest())
  return digests[0] if len(digests) == 1 else fingerprint(files=digests)


def left_out_files(data_files: DataFiles) -> Iterator[Skipped]:
  """The files of a directory that are not read, with the reasons."""
  for file, reason in data_files.left_out:
    yield Skipped(reason, str(file), unit="files")

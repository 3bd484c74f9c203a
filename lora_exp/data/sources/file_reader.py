"""Reads rows and plain text of files on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.data_files import DataFiles, split_name, split_not_read
from lora_exp.data.formats.file_formats import FORMATS, TEXT
from lora_exp.data.formats.row import Row
from lora_exp.data.formats.row_formats import file_rows, find_format
from lora_exp.data.sources.file_source import files_digest, left_out_files
from lora_exp.data.sources.row_reader import RowReader
from lora_exp.data.sources.text import TextFiles


@dataclass(frozen=True)
class FileReader(RowReader):
  """Reads `data_files`, each in the format `format`, or in the format found from its content.

  If a file has several splits, `train_split` is read, and `eval_split` is held out. One of `every` plain text documents
  is held out (None: none).
  """

  data_files: DataFiles
  name: str  # in messages
  format: str | None = None
  train_split: str | None = None
  eval_split: str | None = None
  every: int | None = None
  delimiter: str | None = None  # of tables; None: found

  @property
  def label(self) -> str:
    return self.name

  @property
  def size(self) -> int:
    return sum(path.stat().st_size for path in self.data_files.files)

  @cached_property
  def formats(self) -> Mapping[Path, str]:
    """The format of each file."""
    if self.format is not None:
      return dict.fromkeys(self.data_files.files, self.format)
    return {path: find_format(path) for path in self.data_files.files}

  @property
  def file_formats(self) -> Sequence[str]:
    return list(self.formats.values())

  @property
  def format_words(self) -> str:
    return ", ".join(dict.fromkeys(FORMATS[format].words for format in self.formats.values()))

  @property
  def is_one_json_lines_file(self) -> bool:
    return list(self.formats.values()) == ["jsonl"]

  def identity(self) -> Mapping[str, object]:
    return {"content": files_digest(self.data_files.files)}

  def rows(self) -> Iterator[Row]:
    held_out = split_not_read(self.eval_split) if self.eval_split else None
    before = 0
    for path, format in self.formats.items():
      if format != TEXT:
        for row in file_rows(path, format, str(path), self.train_split, self.delimiter):
          if held_out is None or row.problem != held_out:
            yield replace(row, read=before + row.read)
      before += path.stat().st_size

  def left_out(self) -> Iterator[Skipped]:
    held_out = split_not_read(split_name(self.eval_split)) if self.eval_split else None
    yield from (file for file in left_out_files(self.data_files) if file.reason != held_out)

  @property
  def text_files(self) -> TextFiles:
    """The files that are plain text."""
    return TextFiles(tuple(path for path, format in self.formats.items() if format == TEXT), self.every)

  def texts(self) -> Iterator[Document]:
    if self.text_files.files:
      yield from self.text_files.documents()

  def text_facts(self) -> dict[str, object]:
    return self.text_files.facts()

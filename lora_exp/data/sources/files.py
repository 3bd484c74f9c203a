"""Files of rows in any common format: conversations, prompts and responses, or texts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import ClassVar

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.documents import Document, Skipped
from lora_exp.data.formats.columns import LAYOUTS, NAMES
from lora_exp.data.formats.data_files import path_list
from lora_exp.data.formats.file_formats import FORMATS, ROW_SUFFIXES
from lora_exp.data.formats.hf_datasets import import_datasets, is_dataset, is_hub
from lora_exp.data.formats.layouts import Layout
from lora_exp.data.formats.row import RowProblem
from lora_exp.data.sources.dataset_reader import DatasetReader
from lora_exp.data.sources.file_reader import FileReader
from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.sources.row_reader import RowReader
from lora_exp.data.sources.source import covered_by_digest, example_facts
from lora_exp.data.sources.text import held_out_share
from lora_exp.runtime.cache import fingerprint

READER_VERSION = 1  # version of the code that reads rows; raise it when it reads the same rows differently
PROBED_ROWS = 1000  # read at most, before training, to find one that can be used
CHECKED_ROWS = 20  # the first rows, from which `_is_plain` decides
OPTIONAL = frozenset(NAMES) - {"messages", "prompt", "response", "text"}
# role -> roles that are not read in a row that has it
UNREAD_BESIDE = {
  "messages": ("prompt", "input", "response", "choices", "history", "text"),
  "text": ("prompt", "input", "response", "choices", "history", "system", "tools", "variables"),
}
# part of the identity only if they are set
NEW_SETTINGS = ("format", "columns", "train_split", "eval_split", "subset", "delimiter")


@dataclass(frozen=True)
class Files(FileSource):
  """Rows of files in the formats of `data.formats`, of a dataset that `datasets` saved, or of a dataset on the hub.

  The format of a file is found from its content, and what its columns mean from their names.
  """

  name = "files"
  suffixes: ClassVar[tuple[str, ...]] = ROW_SUFFIXES
  content: ClassVar[str] = "a file, a pattern, a list, a directory, or hub:OWNER/NAME"
  prompt_separator: ClassVar[str | None] = ""

  prompt_field: str = "prompt"
  response_field: str = "response"
  format: str | None = None
  columns: dict[str, str] | None = None
  train_split: str | None = None
  eval_split: str | None = None
  eval_fraction: float = covered_by_digest(0.1)  # the key of the rows contains it in another form (`every`)
  subset: str | None = None  # of a dataset on the hub: its configuration
  delimiter: str | None = None  # of tables; None: found from the first rows
  streaming: bool = covered_by_digest(False)  # download rows from the hub as they are read

  # ---- settings

  def check(self) -> Iterator[str]:
    for setting in ("prompt_field", "response_field"):
      if not getattr(self, setting):
        yield self.problem(setting, "must be the name of a field")
    choices = (*FORMATS, *LAYOUTS)
    if self.format is not None and self.format not in choices:
      yield self.problem("format", f"choose {', '.join(choices)}{did_you_mean(self.format, choices)}")
    for role in self.columns or {}:
      if role not in NAMES:
        yield f"data.columns.{role}: choose {', '.join(NAMES)}{did_you_mean(role, NAMES)}"
    if self.columns and not {"messages", "response", "text"} & self.columns.keys():
      yield self.problem("columns", "name the column to learn: response, messages or text")
    if self.delimiter is not None and len(self.delimiter) != 1:
      yield self.problem("delimiter", "must be one character")
    yield from self._columns_problems()
    if self.eval_path and self.eval_split:
      yield self.problem("eval_split", "data.eval_path is set too; remove one")

  def _columns_problems(self) -> Iterator[str]:
    """The problems of columns that would not be read, or would be read twice."""
    columns = self.columns or {}
    for role, others in UNREAD_BESIDE.items():
      unread = [other for other in others if role in columns and other in columns]
      if unread:
        yield self.problem("columns", f"with {role}, {' and '.join(unread)} would not be read; remove one of them")
        break
    twice = [column for column, count in Counter(columns.values()).items() if count > 1]
    if twice:
      yield self.problem("columns", f"the column {twice[0]!r} has two roles; name another column for one of them")
    for setting, default in (("prompt_field", "prompt"), ("response_field", "response")):
      if columns and getattr(self, setting) != default:
        yield self.problem(setting, "data.columns names the columns too; remove one")
    if columns and self.format in LAYOUTS:
      yield self.problem("format", "data.columns names the columns too; remove one")

  def settings(self) -> dict[str, object]:
    values = super().settings()
    return {name: value for name, value in values.items() if name not in NEW_SETTINGS or value is not None}

  @property
  def wanted_split(self) -> str | None:
    return self.train_split

  @cached_property
  def layout(self) -> Layout:
    """How columns are read."""
    if self.columns:
      return Layout(dict(self.columns))
    if self.format in LAYOUTS:
      return Layout(LAYOUTS[self.format], optional=OPTIONAL)
    return Layout(None, self.prompt_field, self.response_field)

  # ---- checks of files

  def check_inputs(self) -> Iterator[str]:
    problems = list(self._path_problems())
    yield from problems
    if problems or not self.path or any(self.check()):
      return
    try:  # a column that no row has is reported before anything is built
      for source in filter(None, (self, self.held_out())):
        if not is_hub(source.path):  # nothing is downloaded to check settings
          yield from source._first_problem()
    except InputError as error:
      yield from error.problems

  def _path_problems(self) -> Iterator[str]:
    if not self.path:
      yield self.problem("path", f"give data.path=FILE, {self.content}")
    checked = [("path", self.path, self.train_split), ("eval_path", self.eval_path, None)]
    if self.eval_split:
      checked.append(("path", self.path, self.eval_split))
    for setting, value, split in checked:
      if not value:
        continue
      if is_dataset(value):
        try:
          import_datasets()
        except InputError as error:
          yield from error.problems
      elif any(map(is_hub, path_list(value))):
        yield self.problem(setting, "a dataset on the hub cannot be in a list; give one hub:OWNER/NAME")
      else:
        yield from self.file_problems(f"data.{setting}", value, split)

  def _first_problem(self) -> Iterator[str]:
    """The reason why none of the first rows can be used, if there are any rows."""
    first_skipped: Skipped | None = None
    for document in islice(self.documents(), PROBED_ROWS):
      if isinstance(document, Document):
        return
      if document.unit == "rows" and first_skipped is None:
        first_skipped = document
    if first_skipped is not None:
      yield f"{first_skipped.where}: {first_skipped.reason}"

  # ---- data

  @cached_property
  def reader(self) -> RowReader:
    """Reads the rows of `path`."""
    if is_dataset(self.path):
      return DatasetReader(self.path, self.train_split, self.eval_split, self.subset, self.streaming)
    format = self.format if self.format in FORMATS else None
    every = held_out_share(self.eval_path or self.eval_split, self.eval_fraction)
    return FileReader(self.data_files, super().label, format, self.train_split, self.eval_split, every,
                      self.delimiter)

  @property
  def label(self) -> str:
    return self.reader.label

  @property
  def size(self) -> int | None:
    return self.reader.size

  def file_formats(self) -> Sequence[str]:
    return self.reader.file_formats

  @property
  def counts_rest(self) -> bool:
    return not self.streaming

  def held_out(self) -> "Files | None":
    if self.eval_path:
      return self.replace(path=self.eval_path, eval_path=None, train_split=None, eval_split=None, eval_fraction=0.0)
    if self.eval_split:
      return self.replace(train_split=self.eval_split, eval_split=None, eval_fraction=0.0)
    return None

  def digest(self) -> str:
    """SHA-256 (hex) of the data. For files that version 0.1.0 could read, it equals that of version 0.1.0."""
    identity = self.reader.identity()
    return str(identity["content"]) if self._is_plain() else fingerprint(reading=READER_VERSION, **identity)

  def _is_plain(self) -> bool:
    """Whether the data is one file of JSON lines whose first rows have a prompt and a response that are texts."""
    if not self.reader.is_one_json_lines_file:
      return False
    plain = {"prompt": self.prompt_field, "response": self.response_field}
    for row in islice(self.reader.rows(), CHECKED_ROWS):
      document = self.layout.document(row, 0)
      if isinstance(document, Document) and (document.conversation or self.layout.roles(row.fields) != plain):
        return False
    return True

  def documents(self) -> Iterator[Document | Skipped]:
    key = 0
    yield from self.reader.left_out()
    for text in self.reader.texts():
      yield text
      key = text.key + 1
    for row in self.reader.rows():
      result = self.layout.document(row, key)
      yield result
      key += isinstance(result, Document)

  # ---- for messages

  def separator(self) -> str | None:
    """The text between a prompt and its answer; None if the first document is plain text."""
    first = self._readable_first()
    return None if first is not None and not first.prompt and first.conversation is None else self.prompt_separator

  def has_conversations(self) -> bool:
    first = self._readable_first()
    return first is not None and first.conversation is not None

  def _readable_first(self) -> Document | None:
    """The first document; None if the data cannot be read, because a run may be used without it."""
    try:
      return self.first_document()
    except (InputError, OSError):
      return None

  def first_document(self) -> Document | None:
    """The first document; None if none of the first rows can be used."""
    return next((found for found in islice(self.documents(), PROBED_ROWS) if isinstance(found, Document)), None)

  def facts(self) -> dict[str, object]:
    first = self.first_document()
    facts: dict[str, object] = {"data": self.label, "format": self.reader.format_words}
    if not is_dataset(self.path):
      facts |= self.overlap()
    row = next((row for row in self.reader.rows() if not row.problem), None)
    if row is None:
      return facts | self.reader.text_facts()
    if first is not None:
      with suppress(RowProblem):
        facts["columns"] = ", ".join(f"{role}: {name}" for role, name in self.layout.roles(row.fields).items())
    return facts | (example_facts(first) if first else {})

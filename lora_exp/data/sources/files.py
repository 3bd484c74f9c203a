"""Files of rows in any common format: conversations, prompts and responses, or texts."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.data.formats import hf_datasets
from lora_exp.data.formats.data_files import path_list, split_name, split_not_read
from lora_exp.data.formats.hf_datasets import HUB, HubName
from lora_exp.data.formats.layouts import LAYOUTS, NAMES, Layout
from lora_exp.data.formats.row import Row, RowProblem
from lora_exp.data.formats.row_formats import ROW_FORMATS, TEXT, file_rows, find_format
from lora_exp.data.sources.file_source import FileSource, files_digest
from lora_exp.data.sources.source import Document, Skipped, covered_by_digest, example_facts
from lora_exp.data.sources.text import TextFiles, held_out_share, left_out_files
from lora_exp.runtime.cache import fingerprint

READER_VERSION = 1  # version of the code that reads rows; raise it when it reads the same rows differently
PROBED_ROWS = 1000  # read at most, before training, to find one that can be used
CHECKED_ROWS = 20  # the first rows, from which `_is_plain` decides
OPTIONAL = frozenset(NAMES) - {"messages", "prompt", "response", "text"}
# role -> roles that are not read in a row that has it
UNREAD_BESIDE = {
  "messages": ("prompt", "input", "response", "history", "text"),
  "text": ("prompt", "input", "response", "history", "system", "tools", "variables"),
}
NEW_SETTINGS = ("format", "columns", "train_split", "eval_split", "subset")  # part of the identity only if they are set


def is_hub(path: Any) -> bool:
  """Whether `path` names a dataset on the hub."""
  return isinstance(path, str) and path.startswith(HUB)


def is_saved(path: Any) -> bool:
  """Whether `path` is a directory that `datasets` saved."""
  return isinstance(path, str) and hf_datasets.is_saved(Path(path).expanduser())


@dataclass(frozen=True)
class Files(FileSource):
  """Rows of files in the formats of `data.formats`, of a dataset that `datasets` saved, or of a dataset on the hub.

  The format of a file is found from its content, and what its columns mean from their names.
  """

  name = "files"
  suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
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
  streaming: bool = covered_by_digest(False)  # download rows from the hub as they are read

  # ---- settings

  def check(self) -> Iterator[str]:
    for setting in ("prompt_field", "response_field"):
      if not getattr(self, setting):
        yield self.problem(setting, "must be the name of a field")
    choices = (*ROW_FORMATS, TEXT, *LAYOUTS)
    if self.format is not None and self.format not in choices:
      yield self.problem("format", f"choose {', '.join(choices)}{did_you_mean(self.format, choices)}")
    for role in self.columns or {}:
      if role not in NAMES:
        yield f"data.columns.{role}: choose {', '.join(NAMES)}{did_you_mean(role, NAMES)}"
    if self.columns and not {"messages", "response", "text"} & self.columns.keys():
      yield self.problem("columns", "name the column to learn: response, messages or text")
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

  @property
  def is_hub(self) -> bool:
    """Whether the data is a dataset on the hub."""
    return is_hub(self.path)

  @property
  def is_saved(self) -> bool:
    """Whether the data is a directory that `datasets` saved."""
    return is_saved(self.path)

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
    if problems or not self.path or self.is_hub or any(self.check()):
      return
    try:  # a column that no row has is reported before anything is built
      yield from self._first_problem()
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
      if is_hub(value) or is_saved(value):
        try:
          hf_datasets.import_datasets()
        except InputError as error:
          yield from error.problems
      elif any(map(is_hub, path_list(value))):
        yield self.problem(setting, "a dataset on the hub cannot be in a list; give one hub:OWNER/NAME")
      else:
        yield from self.file_problems(f"data.{setting}", value, split)

  def _first_problem(self) -> Iterator[str]:
    """The reason why none of the first rows can be used, if there are any rows."""
    for source in filter(None, (self, self.held_out())):
      if source.is_hub:
        continue
      first_skipped: Skipped | None = None
      for document in islice(source.documents(), PROBED_ROWS):
        if isinstance(document, Document):
          first_skipped = None
          break
        if document.unit == "rows" and first_skipped is None:
          first_skipped = document
      if first_skipped is not None:
        yield f"{first_skipped.where}: {first_skipped.reason}"

  # ---- data

  @cached_property
  def splits(self) -> Mapping[str, Any]:
    """The splits of a Hugging Face dataset."""
    if self.is_hub:
      return hf_datasets.load_hub(HubName.parse(self.path), self.subset, self.streaming)
    return hf_datasets.load_saved(Path(self.path).expanduser())

  @cached_property
  def formats(self) -> Mapping[Path, str]:
    """The format of each file."""
    if self.format in (*ROW_FORMATS, TEXT):
      return dict.fromkeys(self.data_files.files, self.format)
    return {path: find_format(path) for path in self.data_files.files}

  @property
  def label(self) -> str:
    return str(self.path) if self.is_hub or self.is_saved else super().label

  @property
  def size(self) -> int | None:
    return None if self.is_hub or self.is_saved else super().size

  def held_out(self) -> "Files | None":
    if self.eval_path:
      return self.replace(path=self.eval_path, eval_path=None, train_split=None, eval_split=None, eval_fraction=0.0)
    if self.eval_split:
      return self.replace(train_split=self.eval_split, eval_split=None, eval_fraction=0.0)
    return None

  def digest(self) -> str:
    """SHA-256 (hex) of the files. For files that version 0.1.0 could read, it equals that of version 0.1.0."""
    if self.is_hub:
      split = self._split()
      dataset = hf_datasets.identity(self.splits[split], self.path)
      return fingerprint(reading=READER_VERSION, dataset=dataset, split=split)
    if self.is_saved:
      folder = Path(self.path).expanduser() / self._split()
      return fingerprint(reading=READER_VERSION, content=files_digest(sorted(folder.glob("*.arrow"))))
    content = super().digest()
    return content if self._is_plain() else fingerprint(reading=READER_VERSION, content=content)

  def _is_plain(self) -> bool:
    """Whether the data is one file of JSON lines whose first rows have a prompt and a response that are texts."""
    files = self.data_files.files
    if len(files) != 1 or self.formats[files[0]] != "jsonl":
      return False
    plain = {"prompt": self.prompt_field, "response": self.response_field}
    for row in islice(self._rows(), CHECKED_ROWS):
      document = self.layout.document(row, 0)
      if isinstance(document, Document) and (document.conversation or self.layout.roles(row.fields) != plain):
        return False
    return True

  def _split(self) -> str:
    return hf_datasets.choose_split(self.splits, self.train_split, self.label, "train_split")

  def _rows(self) -> Iterator[Row]:
    """The rows of all files that are not plain text, or of the dataset."""
    if self.is_hub or self.is_saved:
      split = self._split()
      label = f"{self.label}, {split}" if split else self.label
      yield from hf_datasets.dataset_rows(self.splits[split], label)
      return
    before = 0
    for path, format in self.formats.items():
      if format != TEXT:
        for row in file_rows(path, format, str(path), self.train_split):
          yield replace(row, read=before + row.read)
      before += path.stat().st_size

  def documents(self) -> Iterator[Document | Skipped]:
    key = 0
    if not (self.is_hub or self.is_saved):
      known = split_not_read(split_name(self.eval_split)) if self.eval_split else ""
      yield from (file for file in left_out_files(self) if file.reason != known)
      for document in self.text_files.documents() if self.text_files.files else ():
        yield document
        key = document.key + 1
    else:
      yield from self._other_splits()
    for row in self._rows():
      if self.eval_split and row.problem == split_not_read(self.eval_split):
        continue
      result = self.layout.document(row, key)
      yield result
      key += isinstance(result, Document)

  @property
  def text_files(self) -> TextFiles:
    """The files that are plain text."""
    files = tuple(path for path, format in self.formats.items() if format == TEXT)
    return TextFiles(files, held_out_share(self.eval_path or self.eval_split, self.eval_fraction))

  def _other_splits(self) -> Iterator[Skipped]:
    """The splits of a dataset that are not read, unless data.train_split is set."""
    if self.train_split is not None:
      return
    for name in self.splits:
      if name not in (self._split(), self.eval_split):
        yield Skipped(split_not_read(name), f"{self.label}, {name}", unit="splits")

  # ---- for messages

  def separator(self) -> str | None:
    """The text between a prompt and its answer; None if the first document is plain text."""
    try:
      first = self.first_document()
    except (InputError, OSError):  # a run may be used without its data
      return self.prompt_separator
    return None if first is not None and not first.prompt and first.conversation is None else self.prompt_separator

  def first_document(self) -> Document | None:
    """The first document; None if none of the first rows can be used."""
    return next((found for found in islice(self.documents(), PROBED_ROWS) if isinstance(found, Document)), None)

  def facts(self) -> dict[str, object]:
    first = self.first_document()
    if self.is_hub or self.is_saved:
      formats = f"Hugging Face dataset, split {self._split() or '-'}"
    else:
      words = {TEXT: "plain text", **ROW_FORMATS}
      formats = ", ".join(dict.fromkeys(words[format] for format in self.formats.values()))
    row = next((row for row in self._rows() if not row.problem), None)
    overlap = {} if self.is_hub or self.is_saved else self.overlap()
    facts: dict[str, object] = {"data": self.label, "format": formats, **overlap}
    if row is not None and first is not None:
      with suppress(RowProblem):
        facts["columns"] = ", ".join(f"{role}: {name}" for role, name in self.layout.roles(row.fields).items())
    if row is None:
      return facts | self.text_files.facts()
    return facts | (example_facts(first) if first else {})

"""Finds the format of a data file from its content, and reads its rows."""

from collections.abc import Iterator
from pathlib import Path

from lora_exp.config.errors import InputError
from lora_exp.data.formats.arrow_rows import arrow_rows
from lora_exp.data.formats.csv_rows import csv_rows, has_known_columns
from lora_exp.data.formats.data_files import plain_suffix
from lora_exp.data.formats.file_content import HEAD, TABLES, open_data
from lora_exp.data.formats.file_formats import TEXT, usual_format
from lora_exp.data.formats.json_rows import document_rows, has_json_lines, line_rows
from lora_exp.data.formats.row import Row

JSON = ("jsonl", "json")


def find_format(path: Path) -> str:
  """The format of a file, from its first bytes. Its suffix decides between formats that begin alike.

  Raises InputError if the file is damaged.
  """
  with open_data(path) as data:
    head = data.stream.read(HEAD)
  usual = usual_format(plain_suffix(path))
  if head.startswith(TABLES):
    return "parquet" if head.startswith(b"PAR1") else "arrow"
  start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
  if start.startswith((b"{", b"[")):
    if start.startswith(b"{") and _has_json_lines(path, usual == "jsonl"):
      return "jsonl"
    if usual in JSON or _is_document(path):
      return "json"
  if usual in ("csv", "tsv"):
    return usual
  if usual in JSON and start:
    return "jsonl"
  if usual in (None, TEXT) and has_known_columns(start.split(b"\n", 1)[0].decode(errors="replace").strip()):
    return "csv"
  return TEXT


def _has_json_lines(path: Path, one_is_enough: bool) -> bool:
  with open_data(path) as data:
    return has_json_lines(data.stream, one_is_enough)


def _is_document(path: Path) -> bool:
  """Whether a file without a JSON suffix is a JSON document. A text may begin with a bracket too."""
  try:
    with open_data(path) as data:
      return any(not row.problem for row in document_rows(data, path.name, None))
  except InputError:
    return False


def file_rows(
  path: Path, format: str, label: str, split: str | None, delimiter: str | None = None
) -> Iterator[Row]:
  """The rows of a file in any of FORMATS but TEXT.

  `split`: the list to read in a JSON object with several; `delimiter`: that of a table (None: detect it). Raises
  InputError if the file is damaged, or in another format.
  """
  if format in ("parquet", "arrow"):
    yield from arrow_rows(path, label)
    return
  with open_data(path) as data:
    if format == "jsonl":
      yield from line_rows(data, label)
    elif format == "json":
      yield from document_rows(data, label, split)
    else:
      yield from csv_rows(data, label, delimiter)

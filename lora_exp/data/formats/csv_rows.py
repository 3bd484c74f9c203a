"""Rows of CSV and TSV files with a header."""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Literal

from lora_exp.config.errors import InputError
from lora_exp.data.formats.columns import NAMES, column_of
from lora_exp.data.formats.file_content import DataStream
from lora_exp.data.formats.row import Row, first_duplicate

DELIMITERS = ("\t", ",", ";", "|")
LONGEST_FIELD = 2**30  # characters; the default of the module csv is 131,072
OTHER_DELIMITERS = "\t,;|^~:"
SWALLOWED = "a quoted cell contains lines that look like rows; perhaps the end of a quote is missing"
SAMPLE = 2**13  # characters, from whose rows the delimiter is found


def has_known_columns(header: str) -> bool:
  """Whether the first line of a file has the names of a prompt and a response column between delimiters."""
  found = (_known_roles(_cells(header, delimiter)) for delimiter in DELIMITERS)
  return any({"prompt", "response"} <= roles for roles in found)


def csv_rows(data: DataStream, label: str, delimiter: str | None = None) -> Iterator[Row]:
  """The rows of a table with `delimiter` between cells (None: detect it). The first line has the names of the columns.

  A quoted cell may contain line breaks; an empty cell is null. Raises InputError if the file is not UTF-8, or if a
  quote is not closed.
  """
  csv.field_size_limit(LONGEST_FIELD)
  text = io.TextIOWrapper(data.stream, encoding="utf-8-sig", newline="")
  last = 1  # number of the line read last
  try:
    header = text.readline()
    while header and not header.strip():  # blank lines before the table
      header, last = text.readline(), last + 1
    if header.lower().startswith("sep="):  # written by spreadsheets to name the delimiter
      delimiter = delimiter or header.strip()[4:5] or None
      header, last = text.readline(), last + 1
    sample = text.read(SAMPLE)
    sample += text.readline()  # the rest of its last line
    delimiter = delimiter or find_delimiter(header, sample)
    names = [name.strip() for name in _cells(header, delimiter)]
    _check_header(names, f"{label}, line {last}")
    header_line = last
    lines = chain(io.StringIO(sample, newline=""), text)
    reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=_quoting(sample, delimiter))
    for cells in reader:
      first, last = last + 1, header_line + reader.line_num
      if any(cells):
        yield _row(names, cells, f"{label}, line {first}", data.read, delimiter)
  except UnicodeDecodeError as error:
    place = f"{error.reason} after line {last}"
    raise InputError(f"{label}: the file is not UTF-8 ({place}); convert it to UTF-8") from error
  except csv.Error as error:
    reason = f"{error}; quote cells as CSV libraries do"
    if "unexpected end" in str(error):
      reason += ", or copy the file again if a download broke off"
    raise InputError(f"{label}, after line {last}: {reason}") from error
  finally:
    text.detach()


def find_delimiter(header: str, sample: str) -> str:
  """The delimiter of a table with the first line `header` and the next lines `sample`.

  The first choice is the delimiter that finds the most known column names in the header. Otherwise it is one with which
  most rows have as many cells as the header, or else the most frequent one in the header; a comma if the header has
  none.
  """
  found = [delimiter for delimiter in DELIMITERS if delimiter in header]
  scores = {delimiter: _score(header, sample, delimiter) for delimiter in found}
  return max(found, key=scores.__getitem__, default=",")


def _score(header: str, sample: str, delimiter: str) -> tuple[int, float, int]:
  """(known names in the header, share of rows with as many cells as the header, occurrences in the header)."""
  names = _cells(header, delimiter)
  try:
    rows = [len(cells) for cells in csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter) if cells]
  except csv.Error:
    rows = []
  return len(_known_roles(names)), rows.count(len(names)) / max(1, len(rows)), header.count(delimiter)


def _quoting(sample: str, delimiter: str) -> Literal[0, 3]:
  """The quoting of a table for the module csv: none if quotes are part of its cells, as in many files with tabs."""
  try:
    list(csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, strict=True))
  except csv.Error as error:
    if delimiter == "\t" and "unexpected end" not in str(error):
      return csv.QUOTE_NONE
  return csv.QUOTE_MINIMAL


def _cells(line: str, delimiter: str) -> list[str]:
  """The cells of a single line."""
  return next(csv.reader([line], delimiter=delimiter), [])


def _known_roles(names: Sequence[str]) -> set[str]:
  """The roles that columns with these names have."""
  return {role for role in NAMES if column_of(role, names) is not None} if len(names) > 1 else set()


def _check_header(names: list[str], where: str) -> None:
  duplicate = first_duplicate(names)
  if duplicate is not None:
    raise InputError(f"{where}: duplicate column {duplicate!r}; rename one of them")


def _row(names: list[str], cells: list[str], where: str, read: int, delimiter: str) -> Row:
  if len(cells) != len(names):
    hint = _delimiter_hint(names, delimiter)
    return Row(where, {}, read, f"{len(cells)} cells, but {len(names)} columns in the header{hint}")
  doubts = (SWALLOWED,) if any(_has_rows(cell, len(names), delimiter) for cell in cells) else ()
  fields = {name: cell or None for name, cell in zip(names, cells, strict=True)}
  return Row(where, fields, read, doubts=doubts, hint=_delimiter_hint(names, delimiter))


def _delimiter_hint(names: list[str], delimiter: str) -> str:
  """About the delimiter, if a name contains what may be another one; else about the header."""
  others = OTHER_DELIMITERS.replace(delimiter, "")
  if len(names) > 1 and not any(character in name for name in names for character in others):
    return "; the first line of a table must be its header"
  return f"; the delimiter is {delimiter!r} (data.options.delimiter names another)"


def _has_rows(cell: str, columns: int, delimiter: str) -> bool:
  """Whether a cell contains lines that look like rows, as it does if the end of a quote is missing."""
  if columns == 1 or "\n" not in cell:
    return False
  inner = [line for line in cell.splitlines()[1:-1] if line.strip()]
  return bool(inner) and all(line.count(delimiter) == columns - 1 for line in inner)

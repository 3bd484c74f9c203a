"""Rows of CSV and TSV files with a header."""

import csv
import io
from collections.abc import Iterator

from lora_exp.config.errors import InputError
from lora_exp.data.formats.file_content import DataStream
from lora_exp.data.formats.row import Row

DELIMITERS = ("\t", ",", ";", "|")
LONGEST_FIELD = 2**30  # characters; the default of the module csv is 131,072


def csv_delimiter(header: str) -> str:
  """The delimiter that occurs most often in the first line of a table; a comma if there is none."""
  return max(DELIMITERS, key=header.count) if any(map(header.count, DELIMITERS)) else ","


def csv_rows(data: DataStream, label: str) -> Iterator[Row]:
  """The rows of a table. Its first line has the names of the columns.

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
      header, last = text.readline(), last + 1
    names = next(csv.reader([header], delimiter=csv_delimiter(header)), [])
    names = [name.strip() for name in names]
    _check_header(names, f"{label}, line {last}")
    header_line = last
    reader = csv.reader(text, delimiter=csv_delimiter(header), strict=True)
    for cells in reader:
      first, last = last + 1, header_line + reader.line_num
      if any(cells):
        yield _row(names, cells, f"{label}, line {first}", data.read)
  except UnicodeDecodeError as error:
    place = f"{error.reason} after line {last}"
    raise InputError(f"{label}: the file is not UTF-8 ({place}); convert it to UTF-8") from error
  except csv.Error as error:
    raise InputError(f"{label}, after line {last}: {error}; quote cells as CSV libraries do") from error
  finally:
    text.detach()


def _check_header(names: list[str], where: str) -> None:
  if len(set(names)) < len(names):
    duplicate = next(name for name in names if names.count(name) > 1)
    raise InputError(f"{where}: duplicate column {duplicate!r}; rename one of them")


def _row(names: list[str], cells: list[str], where: str, read: int) -> Row:
  if len(cells) != len(names):
    return Row(where, {}, read, f"{len(cells)} cells under the {len(names)} columns of the header")
  return Row(where, {name: cell or None for name, cell in zip(names, cells, strict=True)}, read)

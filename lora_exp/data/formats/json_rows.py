"""Rows of JSON files: one object per line, an array of objects, or one object that contains the rows."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from lora_exp.config.errors import InputError
from lora_exp.data.formats.columns import NAMES
from lora_exp.data.formats.data_files import split_not_read
from lora_exp.data.formats.file_content import DataStream, decoded
from lora_exp.data.formats.row import Row, RowProblem, first_duplicate

# An object with one of these keys is a row, or contains columns.
ROW_COLUMNS = {"messages", "conversations", *NAMES["prompt"], *NAMES["response"]}
KNOWN_COLUMNS = {name for names in NAMES.values() for name in names}
SPACES = re.compile(r"[ \t\r\n]*")
PROBED_LINES = 20  # if one of these lines is an object, each line of the file is a row
LONGEST_LINE = 2**25  # bytes; a longer line of JSON lines is skipped, and not read into memory
BROKEN_OFF = "the file ends inside this row, perhaps because a download broke off"


def has_json_lines(stream: IO[bytes], one_is_enough: bool) -> bool:
  """Whether a JSON file has several lines, and one of the first is a complete object.

  `one_is_enough`: whether a file of a single line counts as JSON lines too, rather than as a JSON document.
  """
  objects = lines = 0
  for line, size in _lines(stream):
    if not line.strip():
      continue
    lines += 1
    objects += _is_object(line) if size == len(line) else one_is_enough
    if not objects and not one_is_enough and not line.rstrip().endswith(b"}"):
      return False  # this line begins an object of many lines; later ones may be complete objects
    if objects and (lines > 1 or one_is_enough):
      return True
    if lines == PROBED_LINES:
      break
  return False


def _lines(stream: IO[bytes]) -> Iterator[tuple[bytes, int]]:
  """Each line, and its size in bytes. Of a line longer than LONGEST_LINE, only the beginning is kept."""
  for line in iter(partial(stream.readline, LONGEST_LINE), b""):
    size, part = len(line), line
    while len(part) == LONGEST_LINE and not part.endswith(b"\n"):
      part = stream.readline(LONGEST_LINE)
      size += len(part)
    yield line, size


def _is_object(line: bytes) -> bool:
  try:
    return isinstance(json.loads(without_comma(line.decode("utf-8-sig"))), dict)
  except (ValueError, RecursionError):
    return False


def without_comma(line: str) -> str:
  """`line` without the comma that some programs write after each object."""
  line = line.rstrip()
  return line[:-1] if line.endswith("},") else line


def line_rows(data: DataStream, label: str) -> Iterator[Row]:
  """The rows of a file with one object per line. Blank lines are skipped. Raises InputError if it is not UTF-8."""
  offset = 0
  for number, (line, size) in enumerate(_lines(data.stream), 1):
    start, offset = offset, offset + size
    if not line.strip():
      continue
    where = f"{label}, line {number}"
    if size > len(line):
      too_long = f"the line has more than {LONGEST_LINE:,} bytes; split the row"
      yield Row(where, {}, data.read, too_long, f"{size:,} bytes")
      continue
    text = decoded(line, label, number, start).removeprefix("\ufeff")  # files with byte order marks may be joined
    try:
      yield _row(json.loads(without_comma(text), object_pairs_hook=_unique), where, data.read)
    except RowProblem as error:
      yield Row(where, {}, data.read, str(error))
    except json.JSONDecodeError as error:
      reason = "not JSON" if line.endswith(b"\n") or not _ends_early(error) else BROKEN_OFF
      yield Row(where, {}, data.read, reason, f"{error.msg.removesuffix(' at')} at column {error.colno}")
    except ValueError as error:
      yield Row(where, {}, data.read, "not JSON", str(error))  # such as a number of 5,000 digits
    except RecursionError:
      yield Row(where, {}, data.read, "JSON nested too deeply")


def _ends_early(error: json.JSONDecodeError) -> bool:
  """Whether the text ends before its value does."""
  return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc.rstrip())


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The object of `pairs`. Raises RowProblem for a duplicate key, of which `json` would keep the last value."""
  value = dict(pairs)
  if len(value) < len(pairs):
    raise RowProblem(f"duplicate key {first_duplicate(name for name, _ in pairs)!r}")
  return value


def _row(value: Any, where: str, read: int) -> Row:
  if isinstance(value, RowProblem):
    return Row(where, {}, read, str(value))
  if isinstance(value, dict):
    return Row(where, value, read)
  return Row(where, {}, read, f"expected a JSON object, got {_kind(value)}")


def _kind(value: Any) -> str:
  return {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number")


def document_rows(data: DataStream, label: str, split: str | None) -> Iterator[Row]:
  """The rows of a file of JSON arrays and objects that may span several lines.

  `split`: the name of the list to read if an object contains several lists of rows. Raises InputError if the file is
  not JSON.
  """
  text = decoded(data.stream.read(), label, 1, 0)
  with _json_errors(label):
    if not text.lstrip().startswith("["):
      values = list(_elements(text))
      if len(values) == 1 and isinstance(values[0], dict):
        yield from _rows_of_object(values[0], label, data.read, split)
        return
    if split is not None:
      raise InputError(f"{label} has no split {split!r}: it is a list of rows; give data.eval_path=FILE")
    for number, value in enumerate(_elements(text), 1):
      yield _row(value, f"{label}, row {number}", data.read)


def _elements(text: str) -> Iterator[Any]:
  """Yields the JSON values in `text` one after another; of an array, its elements."""
  decoder, position, in_array = json.JSONDecoder(object_pairs_hook=_unique), _next(text, 0), False
  while position < len(text):
    if not in_array and text[position] == "[":
      position, in_array = _next(text, position + 1), True
      if text.startswith("]", position):
        position, in_array = _next(text, position + 1), False
      continue
    try:
      value, position = decoder.raw_decode(text, position)
    except RowProblem as problem:  # the following rows can still be read
      value, position = problem, json.JSONDecoder().raw_decode(text, position)[1]
    yield value
    position = _next(text, position)
    if in_array and text.startswith(("]", ","), position):
      in_array = text[position] == ","
      position = _next(text, position + 1)
    elif in_array:
      raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
  if in_array:
    raise json.JSONDecodeError("Expecting value", text, position)


def _next(text: str, position: int) -> int:
  """The position of the next character that is not white space."""
  match = SPACES.match(text, position)
  return position if match is None else match.end()


@contextmanager
def _json_errors(label: str) -> Iterator[None]:
  """Raises InputError with the line for a file that is not JSON."""
  try:
    yield
  except json.JSONDecodeError as error:
    reason = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    advice = "give an array of rows, or one object per line"
    if _ends_early(error):
      advice = "the file ends before its last value does, perhaps because a download broke off; copy it again"
    raise InputError(f"{label}, line {error.lineno}: {reason}; {advice}") from error
  except ValueError as error:
    raise InputError(f"{label}: not JSON: {error}") from error
  except RecursionError as error:
    raise InputError(f"{label}: JSON nested too deeply") from error
  except RowProblem as error:
    raise InputError(f"{label}: {error}") from error


def _rows_of_object(value: Mapping[str, Any], label: str, read: int, split: str | None) -> Iterator[Row]:
  """The rows of an object: one with lists of rows (`{"data": [row, …]}`), with rows by name (`{"0": row, …}`), with
  columns, or a single row."""
  if _are_rows_by_name(value):
    for name, fields in value.items():
      yield Row(f"{label}, row {name!r}", fields, read)
    return
  lists = {name: rows for name, rows in value.items() if _are_rows(rows)}
  if lists and not ROW_COLUMNS & value.keys():
    yield from _rows_of_splits(lists, label, read, split)
    for name, other in value.items():
      if isinstance(other, list) and other and name not in lists:
        yield Row(f"{label}, {name}", {}, read, f"the list {name!r} has no objects, and is not read")
    return
  for number, fields in enumerate(_rows_of_columns(value) or (value,), 1):
    yield Row(f"{label}, row {number}", fields, read)


def _are_rows_by_name(value: Mapping[str, Any]) -> bool:
  """Whether an object contains a row under each name, and not a column as an object from index to value."""
  if not value or KNOWN_COLUMNS & value.keys() or not all(isinstance(row, dict) and row for row in value.values()):
    return False
  return not all(key.isdecimal() for row in value.values() for key in row)


def _are_rows(value: Any) -> bool:
  """Whether `value` is a list of rows; single ones may be of another type."""
  return isinstance(value, list) and sum(isinstance(row, dict) for row in value) > len(value) / 2


def _rows_of_splits(
  lists: Mapping[str, Sequence[Any]], label: str, read: int, split: str | None
) -> Iterator[Row]:
  wanted = split or ("train" if len(lists) > 1 else next(iter(lists)))
  if wanted not in lists:
    raise InputError(f"{label} contains the lists {', '.join(lists)}; choose one: data.train_split={next(iter(lists))}")
  for name, rows in lists.items():
    for number, fields in enumerate(rows, 1):
      where = f"{label}, {name}, row {number}"
      if name == wanted:
        yield _row(fields, where, read)
      elif split is None:
        yield Row(where, {}, read, split_not_read(name))


def _rows_of_columns(value: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
  """The rows of an object of equally long columns, as pandas and `datasets` write it; [] for any other object.

  A column is a list, or an object from index to value.
  """
  columns = {name: list(column.values()) if isinstance(column, dict) else column for name, column in value.items()}
  lists = [column for column in columns.values() if isinstance(column, list)]
  if len(lists) < len(columns) or any(map(_are_rows, lists)) or len(set(map(len, lists))) != 1:
    return []
  return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]

"""Rows of Parquet and Arrow files, which pyarrow reads."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.formats.file_content import compression_of, import_pyarrow, open_data
from lora_exp.data.formats.row import Row

BATCH_ROWS = 1024  # converted at once
STREAM = b"\xff\xff\xff\xff"  # first bytes of an Arrow file in the stream format, which `datasets` writes


def arrow_rows(path: Path, label: str) -> Iterator[Row]:
  """The rows of a Parquet or Arrow file. Raises InputError if it is damaged, or pyarrow is not installed."""
  pyarrow = import_pyarrow(f"{path}: a Parquet or Arrow file")
  size, number = path.stat().st_size, 0
  try:
    for batch in _batches(path):
      for fields in batch.to_pylist():
        number += 1
        yield Row(f"{label}, row {number}", without_nulls(fields), size)
  except pyarrow.ArrowException as error:
    raise InputError(f"{path}: pyarrow cannot read it: {str(error).splitlines()[0]}") from error


def _batches(path: Path) -> Iterable[Any]:
  """The record batches of a file. Only a compressed file is read into memory as a whole."""
  import pyarrow
  import pyarrow.parquet

  with path.open("rb") as file:
    compressed = compression_of(file.peek(8)) is not None
  if compressed:
    with open_data(path) as data:
      source = pyarrow.BufferReader(data.stream.read())
  else:
    source = pyarrow.memory_map(str(path))
  magic = bytes(source.read(8))
  source.seek(0)
  if magic.startswith(b"PAR1"):
    yield from pyarrow.parquet.ParquetFile(source).iter_batches(BATCH_ROWS)
  elif magic.startswith(STREAM):
    yield from pyarrow.ipc.open_stream(source)
  else:
    reader = pyarrow.ipc.open_file(source)
    yield from map(reader.get_batch, range(reader.num_record_batches))


def without_nulls(fields: Mapping[str, Any]) -> dict[str, Any]:
  """`fields` without nulls inside nested objects.

  Arrow gives all objects of a column the same keys, and null for those that an object did not have.
  """
  return {name: _without_nulls(value) for name, value in fields.items()}


def _without_nulls(value: Any) -> Any:
  if isinstance(value, dict):
    return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
  if isinstance(value, list):
    return [_without_nulls(inner) for inner in value]
  return value

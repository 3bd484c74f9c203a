"""Rows of Parquet and Arrow files, which pyarrow reads."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.data.formats.file_content import MOST_EXPANDED, MOST_TIMES, compression_of, import_pyarrow, open_data
from lora_exp.data.formats.row import Row
from lora_exp.runtime.foreign_files import CAUSES

MOST_ROWS = 10**6  # of a file with fewer bytes
BATCH_ROWS = 1024  # converted at once
STREAM = b"\xff\xff\xff\xff"  # first bytes of an Arrow file in the stream format, which `datasets` writes


def arrow_rows(path: Path, label: str) -> Iterator[Row]:
  """The rows of a Parquet or Arrow file. Raises InputError if it is damaged, or pyarrow is not installed."""
  pyarrow = import_pyarrow(f"{path}: a Parquet or Arrow file")
  size, number = path.stat().st_size, 0
  batches = _batches(path)
  while True:
    try:
      batch = next(batches, None)
      if batch is not None:
        batch.validate(full=True)  # offsets in a damaged file may point outside of its memory
      rows = [] if batch is None else [without_nulls(fields) for fields in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, *CAUSES) as error:
      reason = str(error).splitlines() or [type(error).__name__]
      raise InputError(f"{path}: pyarrow cannot read it: {reason[0]}") from error
    if batch is None:
      return
    for fields in rows:
      number += 1
      yield Row(f"{label}, row {number}", fields, size)


def _batches(path: Path) -> Iterator[Any]:
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
    parquet = pyarrow.parquet.ParquetFile(source)
    _check_size(path, parquet.metadata)
    yield from parquet.iter_batches(BATCH_ROWS)
  elif magic.startswith(STREAM):
    yield from pyarrow.ipc.open_stream(source)
  else:
    reader = pyarrow.ipc.open_file(source)
    yield from map(reader.get_batch, range(reader.num_record_batches))


def _check_size(path: Path, metadata: Any) -> None:
  """Raises InputError for a Parquet file whose few bytes expand to more than the memory holds, or take days to read."""
  size = path.stat().st_size
  groups = [metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups)]
  if max([*groups, 0]) > max(MOST_EXPANDED, MOST_TIMES * size) or metadata.num_rows > max(MOST_ROWS, MOST_TIMES * size):
    raise InputError(f"{path}: claims {metadata.num_rows:,} rows with {sum(groups):,} bytes in {size:,} bytes, like "
                     "a file made to fill the memory; if the data is real, write it without compression")


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

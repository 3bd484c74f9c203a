"""The formats of data files: their names, and the usual suffixes of their files."""

from typing import NamedTuple


class FileFormat(NamedTuple):
  """A format of data files."""

  words: str  # in messages
  suffixes: tuple[str, ...]  # in lower case, without that of a compression


TEXT = "text"
FORMATS: dict[str, FileFormat] = {  # by the value of data.format
  "jsonl": FileFormat("JSON lines", (".jsonl", ".ndjson")),
  "json": FileFormat("a JSON document", (".json",)),
  "csv": FileFormat("CSV", (".csv",)),
  "tsv": FileFormat("TSV", (".tsv", ".tab")),
  "parquet": FileFormat("Parquet", (".parquet", ".pq")),
  "arrow": FileFormat("Arrow", (".arrow", ".feather")),
  TEXT: FileFormat("plain text", (".txt", ".text", ".md")),
}
TEXT_SUFFIXES = FORMATS[TEXT].suffixes
ROW_SUFFIXES = tuple(suffix for name, form in FORMATS.items() if name != TEXT for suffix in form.suffixes)


def usual_format(suffix: str) -> str | None:
  """The format of files with this suffix; None if it is that of no format."""
  return next((name for name, form in FORMATS.items() if suffix in form.suffixes), None)

"""A row of a file: its fields, or why it cannot be used."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN = 80  # characters of a row in a message


@dataclass(frozen=True)
class Row:
  """A row, and its place in the file."""

  where: str  # "pairs.jsonl, line 7"
  fields: Mapping[str, Any] = field(default_factory=dict)
  read: int = 0  # bytes of the file read so far
  problem: str = ""  # why the row has no fields
  detail: str = ""  # about the problem in this row; rows are counted by `problem` alone
  doubts: tuple[str, ...] = ()  # messages about a row that is read, but perhaps not as it was meant
  hint: str = ""  # added to the message about missing columns


def excerpt(value: object) -> str:
  """The beginning of `value` in one line."""
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
  text = " ".join(text.split())
  return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"


def first_duplicate(names: Iterable[str]) -> str | None:
  """The first of `names` that came before, or None."""
  seen: set[str] = set()
  for name in names:
    if name in seen:
      return name
    seen.add(name)
  return None


class RowProblem(Exception):
  """Why a row cannot be used. Rows are counted by the message."""

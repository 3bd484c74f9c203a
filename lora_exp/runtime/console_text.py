"""Text of values, amounts and times for the terminal."""

import numbers
import re
from collections.abc import Mapping


def printable(value: object) -> str:
  r"""`value` as text; control characters other than newline and tab are escaped, as in `\x1b`."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", _escape, str(value))


def _escape(match: re.Match[str]) -> str:
  return f"\\x{ord(match[0]):02x}"


def cell(value: object) -> str:
  """Formats `value` for a table: 1,234,567, 0.01234, yes, and a dash for None."""
  if value is None:
    return "-"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, numbers.Integral):
    return f"{int(value):,}"
  if isinstance(value, numbers.Real):
    number = float(value)
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e15 else f"{number:.4g}"
  if isinstance(value, list):
    return ", ".join(map(cell, value))
  return printable(value)


def is_number(value: object) -> bool:
  """Whether `value` is a number and not a bool."""
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def fields_text(fields: Mapping[str, object]) -> str:
  """Named values on one line, as in `loss 1.234  tokens/s 3,281`."""
  return "  ".join(f"{name} {cell(value)}" for name, value in fields.items())


def progress_text(done: float, total: float | None, unit: str) -> str:
  """How much of the work is done: `13/32 steps`, `1.2/48.0 MB` for bytes, or '' for work without a count."""
  if unit == "bytes":
    of_total = "" if total is None else f"/{total / 1e6:,.1f}"
    return f"{done / 1e6:,.1f}{of_total} MB"
  if total is None and not unit:
    return ""
  of_total = "" if total is None else f"/{int(total):,}"
  return f"{int(done):,}{of_total} {unit}".rstrip()


def duration(seconds: float) -> str:
  """A number of seconds as `42 s`, `3 min 5 s` or `2 h 7 min`."""
  whole = round(seconds)
  if whole < 60:
    return f"{whole} s"
  minutes, rest = divmod(whole, 60)
  return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def time_left(elapsed: float, done: float, total: float) -> str:
  """`, about 3 min 5 s left` if part of the work is done, else ''. `elapsed` is in seconds."""
  seconds = elapsed * (total - done) / done if 0 < done < total else 0
  return f", about {duration(seconds)} left" if seconds >= 0.5 else ""

"""Terminal output: errors, tables, facts, and progress bars.

Text from users and models is printed literally: markup is not interpreted, and control characters are escaped, so that
a sample of a byte-level model cannot move the cursor. In a pipe or a file, tables have at most 100 columns, and
progress bars become a few plain lines.
"""

import numbers
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lora_exp.config.errors import LoraExpError

WIDTH = 100  # columns of a table, and of all output that is not a terminal
QUIET_SECONDS = 2.0  # in a pipe, shorter work prints no progress lines

console = Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else WIDTH)
_stderr = Console(stderr=True, markup=False, highlight=False, emoji=False)
_display: Progress | None = None  # shared by nested progress bars, because a terminal can draw only one display


def share() -> None:
  """From now on prints only plain lines, even in a terminal, because other processes write to it too."""
  global console
  console = Console(markup=False, highlight=False, emoji=False, width=WIDTH, force_terminal=False)


def printable(value: object) -> str:
  r"""`value` as text; control characters other than newline and tab are escaped, as in `\x1b`."""
  return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", _escape, str(value))


def _escape(match: re.Match[str]) -> str:
  return f"\\x{ord(match[0]):02x}"


def show(*values: object, style: str | None = None) -> None:
  """Prints plain text; the terminal wraps long lines."""
  console.print(*map(printable, values), style=style, soft_wrap=True)


def show_paragraph(text: str) -> None:
  """Prints prose: in lines that are wrapped between words in a terminal, as one line in a file."""
  console.print(printable(text), soft_wrap=not console.is_terminal)


def write(text: str) -> None:
  """Prints `text` immediately and without a newline, for streamed output."""
  console.file.write(printable(text))
  console.file.flush()


def show_error(error: LoraExpError) -> None:
  """Prints `error: …` on standard error, one line per problem, without a traceback."""
  for problem in getattr(error, "problems", None) or [str(error) or type(error).__name__]:
    _stderr.print(Text("error: ", style="bold red") + Text(printable(problem)), soft_wrap=True)


def show_warning(message: str) -> None:
  """Prints `warning: …` on standard error."""
  _stderr.print(Text("warning: ", style="bold yellow") + Text(printable(message)), soft_wrap=True)


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


def _is_number(value: object) -> bool:
  return isinstance(value, numbers.Real) and not isinstance(value, bool)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
  """Prints a table; columns with only numbers, and those named in `right`, are right-aligned."""
  rows = [list(row) for row in rows]
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
  for i, name in enumerate(columns):
    values = [row[i] for row in rows if row[i] is not None]
    to_right = name in right or (bool(values) and all(map(_is_number, values)))
    table.add_column(Text(printable(name)), justify="right" if to_right else "left", overflow="fold", no_wrap=to_right)
  for row in rows:
    table.add_row(*(Text(cell(value)) for value in row))
  _print_table(title, table)


def show_facts(title: str, facts: Mapping[str, object]) -> None:
  """Prints a table with two columns, names and values."""
  table = Table(box=None, show_header=False, pad_edge=False)
  table.add_column(style="dim", no_wrap=True)
  table.add_column(overflow="fold")
  for name, value in facts.items():
    table.add_row(Text(printable(name)), Text(cell(value)))
  _print_table(title, table)


def show_labelled(title: str, lines: Iterable[tuple[str, str, str]]) -> None:
  """Prints a title and `lines` of (label, text, style); the style '' is plain."""
  table = Table(box=None, show_header=False, pad_edge=False)
  table.add_column(no_wrap=True)
  table.add_column(overflow="fold")
  for label, text, style in lines:
    table.add_row(Text(label, style=style), Text(printable(text), style=style))
  _print_table(title, table)


def _print_table(title: str, table: Table) -> None:
  console.print()
  console.print(Text(printable(title), style="bold"))
  console.print(table, width=min(console.width, WIDTH))


class Bar(Protocol):
  """A progress bar."""

  def advance(self, n: int = 1, **fields: object) -> None:
    """Advances by `n`; `fields` (loss=…) are shown next to the bar until they change."""

  def print(self, *values: object) -> None:
    """Prints a line above the bar."""


@contextmanager
def progress(title: str, total: int | None, unit: str = "", start: int = 0) -> Iterator[Bar]:
  """A bar that counts `unit`s from `start` to `total` (None: unknown); in a pipe, a line for about every 10 %.

  Bars can be nested: an inner one appears under the outer one and disappears when it is finished.
  """
  if not console.is_terminal:
    lines = LineBar(title, total, unit, start)
    yield lines
    lines.finish()
    return
  global _display
  outer = _display
  if outer is not None:
    bar = DrawnBar(outer, title, total, unit, start)
    try:
      yield bar
    finally:
      outer.remove_task(bar.task)
    return
  with _new_display() as _display:
    try:
      yield DrawnBar(_display, title, total, unit, start)
    finally:
      _display = None


def _new_display() -> Progress:
  columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), MofNCompleteColumn(),
             TextColumn("{task.fields[unit]}", markup=False), TimeRemainingColumn(), FieldsColumn())
  return Progress(*columns, console=console, refresh_per_second=4)


class FieldsColumn(ProgressColumn):
  """The latest fields of a bar, as in `loss 1.234`."""

  def render(self, task: Task) -> Text:
    return Text(_fields_text(task.fields["fields"]), style="dim")


def _fields_text(fields: Mapping[str, object]) -> str:
  return "  ".join(f"{name} {cell(value)}" for name, value in fields.items())


class DrawnBar:
  """A bar drawn in place in a terminal."""

  def __init__(self, display: Progress, title: str, total: int | None, unit: str, start: int):
    self.display, self.fields = display, dict[str, object]()
    self.task = display.add_task(printable(title), total=total, completed=start, unit=unit, fields=self.fields)

  def advance(self, n: int = 1, **fields: object) -> None:
    self.fields.update(fields)  # read by the display a few times per second
    self.display.advance(self.task, n)

  def print(self, *values: object) -> None:
    show(*values)


class LineBar:
  """A bar as lines for a pipe or a file: after each tenth of the work, or at doubling times if the total is unknown."""

  def __init__(self, title: str, total: int | None, unit: str, start: int):
    self.title, self.total, self.unit, self.done = title, total, unit, start
    self.fields: dict[str, object] = {}
    self.tenth = max(1, -(-(total - start) // 10)) if total is not None else 0
    self.start_time = time.monotonic()
    self.next_done, self.next_time = start + self.tenth, self.start_time + QUIET_SECONDS
    self.printed: int | None = None  # count on the last printed line

  def advance(self, n: int = 1, **fields: object) -> None:
    self.done += n
    self.fields.update(fields)
    now = time.monotonic()
    if now < self.next_time or self.done < self.next_done:
      return
    self._print_line(now)
    if self.total is None:
      self.next_time = now + (now - self.start_time)
    else:
      self.next_done = self.done + self.tenth

  def print(self, *values: object) -> None:
    show(*values)

  def finish(self) -> None:
    """Prints the last line, unless it was printed already or the work was short."""
    now = time.monotonic()
    if self.printed != self.done and now - self.start_time >= QUIET_SECONDS:
      self._print_line(now)

  def _print_line(self, now: float) -> None:
    self.printed = self.done
    of_total = "" if self.total is None else f"/{self.total:,}"
    count = f"{self.title}: {self.done:,}{of_total} {self.unit}".rstrip()
    fields = f"  {_fields_text(self.fields)}" if self.fields else ""
    show(f"{count}, {now - self.start_time:,.0f} s{fields}")

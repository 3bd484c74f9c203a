"""Terminal output: errors, tables, facts, and progress bars.

Text from users and models is printed literally: markup is not interpreted, and control characters are escaped, so that
a sample of a byte-level model cannot move the cursor. In a pipe or a file, tables have at most 100 columns, and
progress bars become lines. Everything that is printed is also logged as plain text, in lora_exp.log of the run.
"""

import io
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from lora_exp.config.credentials import without_secrets
from lora_exp.config.errors import LoraExpError
from lora_exp.runtime.console_text import cell, is_number, printable
from lora_exp.runtime.output_stream import TolerantStream
from lora_exp.runtime.progress_bars import Bar, DrawnBar, LineBar, new_display

__all__ = ["Bar", "cell", "printable"]

WIDTH = 100  # columns of a table, and of all output that is not a terminal
MOST_UNLOGGED = 1000  # texts that are kept for a log that is opened later
_log = logging.getLogger("lora_exp.console")


def _new_console(**settings: object) -> Console:
  return Console(markup=False, highlight=False, emoji=False, **settings)  # type: ignore[arg-type]


console = _new_console(width=None if TolerantStream(sys.stdout).isatty() else WIDTH)
_stderr = _new_console(stderr=True)
_warnings = _stderr  # where warnings go
_error_prefix = ""
_held_errors: list[LoraExpError] | None = None  # errors that another process may show too; None: shown at once
_status_on_stderr = False  # whether everything but the result of a task goes to standard error
_display: Progress | None = None  # shared by nested progress bars, because a terminal can draw only one display
_lines: LineBar | None = None  # of the innermost progress bar
_unlogged: list[tuple[int, str]] | None = []  # printed before a log was opened; None: it is open


def share() -> None:
  """From now on prints only plain lines, even in a terminal, because other processes write to it too."""
  global console
  console = _new_console(width=WIDTH, force_terminal=False)


def show_only_errors(prefix: str) -> None:
  """From now on prints only errors, with a prefix, and only when `release_errors` is called."""
  global console, _warnings, _error_prefix, _held_errors
  _held_errors = []
  console = _warnings = _new_console(width=WIDTH, file=open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
  _error_prefix = prefix


def release_errors(shown: bool) -> None:
  """Prints the errors that were held back, or discards them. Later errors are printed at once."""
  global _held_errors
  errors, _held_errors = _held_errors or [], None
  for error in errors if shown else ():
    show_error(error)


@contextmanager
def status_on_stderr() -> Iterator[None]:
  """Context in which only `write` goes to standard output, so that it holds nothing but a task's result."""
  global _status_on_stderr
  before, _status_on_stderr = _status_on_stderr, True
  try:
    yield
  finally:
    _status_on_stderr = before


def log_opened() -> None:
  """Logs what was printed before the log was opened. From now on, text is logged when it is printed."""
  global _unlogged
  texts, _unlogged = _unlogged or [], None
  for level, text in texts:
    _log.log(level, "%s", text)


def log_later() -> None:
  """Begins a command. Until its log is opened, what is printed is kept for the log."""
  global _unlogged
  _unlogged = []


def _record(text: str, level: int = logging.INFO) -> None:
  """Logs a text that was printed."""
  if _unlogged is None:
    _log.log(level, "%s", text)
  elif len(_unlogged) < MOST_UNLOGGED:
    _unlogged.append((level, text))


def _out() -> Console:
  return _stderr if _status_on_stderr else console


def _print(out: Console, text: Text, level: int = logging.INFO) -> None:
  """Prints a text: broken between words in a terminal, in one line in a file. Words are never broken, so that paths
  can be copied."""
  if out.is_terminal:
    out.print(text, overflow="ignore", no_wrap=False, crop=False)
  else:
    out.print(text, soft_wrap=True)
  _record(text.plain, level)


def show(*values: object, style: str | None = None) -> None:
  """Prints plain text. In a terminal, long lines are broken between words."""
  _print(_out(), Text(" ".join(map(printable, values)), style=style or ""))


def show_command(title: str, command: str) -> None:
  """Prints a title and a command, which is not broken into lines, so that it can be copied."""
  text = Text(f"{printable(title)} {printable(command)}")
  if _out().is_terminal and text.cell_len > _out().width:
    text = Text(f"{printable(title)}\n  {printable(command)}")
  _out().print(text, soft_wrap=True)
  _record(text.plain)


def write(text: str) -> None:
  """Writes `text` to standard output immediately and without a newline, for streamed output."""
  console.file.write(printable(text))
  console.file.flush()


def show_error(error: LoraExpError) -> None:
  """Prints `error: …` on standard error, one line per problem, without a traceback."""
  if _held_errors is not None:
    _held_errors.append(error)
    return
  for problem in getattr(error, "problems", None) or [str(error) or type(error).__name__]:
    problem = without_secrets(problem)
    _print(_stderr, Text.assemble(("error: ", "bold red"), printable(_error_prefix + problem)), logging.ERROR)


def show_warning(message: str) -> None:
  """Prints `warning: …` on standard error."""
  _print(_warnings, Text.assemble(("warning: ", "bold yellow"), printable(without_secrets(message))), logging.WARNING)


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
  """Prints a table; columns with only numbers, and those named in `right`, are right-aligned."""
  rows = [list(row) for row in rows]
  table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
  for i, name in enumerate(columns):
    values = [row[i] for row in rows if row[i] is not None]
    to_right = name in right or (bool(values) and all(map(is_number, values)))
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
  out = _out()
  out.print()
  out.print(Text(printable(title), style="bold"))
  out.print(table, width=min(out.width, WIDTH))
  file = io.StringIO()
  _new_console(width=WIDTH, file=file, force_terminal=False).print(table)
  _record("\n".join(["", printable(title), *(line.rstrip() for line in file.getvalue().splitlines())]))


@contextmanager
def progress(title: str, total: int | None, unit: str = "", start: int = 0) -> Iterator[Bar]:
  """A bar that counts `unit`s from `start` to `total` (None: unknown); lines in a pipe. `bytes` are shown in MB.

  Bars can be nested: an inner one appears under the outer one and disappears when it is finished.
  """
  with _bar(title, total, unit, start, transient=False) as bar:
    yield bar


@contextmanager
def phase(title: str) -> Iterator[Bar]:
  """A bar without a count for work such as `compile the step`. After two seconds or more its duration is printed."""
  with _bar(title, None, "", 0, transient=True) as bar:
    yield bar


@contextmanager
def _bar(title: str, total: int | None, unit: str, start: int, transient: bool) -> Iterator[Bar]:
  """A bar in a terminal, and its lines in the log; or its lines."""
  global _lines
  out, outer = _out(), _lines
  drawn = out.is_terminal
  lines = LineBar(title, total, unit, start, _record if drawn else show, show if transient or not drawn else _record)
  if outer is not None:
    outer.paused = True
  _lines = lines
  try:
    with _drawn_bar(out, lines, transient) if drawn else nullcontext(lines) as bar:
      yield bar
    lines.finish()
  finally:
    lines.stop()
    _lines = outer
    if outer is not None:
      outer.paused = False


@contextmanager
def _drawn_bar(out: Console, lines: LineBar, transient: bool) -> Iterator[Bar]:
  """A bar in the display of a terminal, which the outermost bar starts and stops."""
  global _display
  if _display is not None:
    bar = DrawnBar(_display, lines, show, inner=True)
    try:
      yield bar
    finally:
      _display.remove_task(bar.task)
    return
  with new_display(out, transient) as _display:
    try:
      yield DrawnBar(_display, lines, show)
    finally:
      _display = None

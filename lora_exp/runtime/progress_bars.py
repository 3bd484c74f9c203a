"""Progress of work: bars that are drawn in place in a terminal, and lines for a pipe, a file and the log."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from lora_exp.runtime.console_text import duration, fields_text, printable, progress_text, time_left

QUIET_SECONDS = 2.0  # shorter work prints no lines
REVEALED_SECONDS = 0.7  # shorter work inside other work is not drawn, because the bars would jump
MOST_SILENCE = 60.0  # seconds between two lines
NARROW = 100  # columns of a terminal in which bars are short


class Bar(Protocol):
  """A progress bar."""

  def advance(self, n: int = 1, **fields: object) -> None:
    """Advances by `n`; `fields` (loss=…) are shown next to the bar until they change."""

  def print(self, *values: object) -> None:
    """Prints a line above the bar."""


class FieldsColumn(ProgressColumn):
  """The latest fields of a bar, as in `loss 1.234`, cut off at the edge of the terminal."""

  def render(self, task: Task) -> Text:
    return Text(fields_text(task.fields["fields"]), style="dim", no_wrap=True, overflow="ellipsis")


class WorkColumn(ProgressColumn):
  """How much is done, the elapsed time, and the estimate of the remaining time."""

  def render(self, task: Task) -> Text:
    parts = [progress_text(task.completed, task.total, task.fields["unit"]), duration(task.elapsed or 0)]
    remaining = task.time_remaining
    if remaining is not None and not task.finished:
      parts.append(f"{duration(remaining)} left")
    return Text(", ".join(part for part in parts if part))


def new_display(console: Console, transient: bool) -> Progress:
  """A display of bars. One that is `transient` disappears at its end."""
  width = 24 if console.width >= NARROW else 12
  columns = (
    TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
    BarColumn(bar_width=width),
    WorkColumn(table_column=Column(no_wrap=True)),
    FieldsColumn(table_column=Column(overflow="ellipsis")),
  )
  return Progress(*columns, console=console, refresh_per_second=4, transient=transient)


class LineBar:
  """A bar as lines: the first after two seconds, then after twice the time, at most a minute apart.

  A thread prints them, so that they also come while a step or a compilation takes long. `reveal` is called once the
  work takes long enough to be shown inside other work.
  """

  def __init__(
    self, title: str, total: int | None, unit: str, start: int, show: Callable[[str], None],
    show_last: Callable[[str], None],
  ):  # fmt: skip
    self.title, self.total, self.unit, self.show, self.show_last = title, total, unit, show, show_last
    self.start = self.done = start
    self.reveal: Callable[[], None] | None = None
    self.paused = False  # whether the work inside shows its own progress
    self.fields: dict[str, object] = {}
    self.began = time.monotonic()
    self.next_time = self.began + QUIET_SECONDS
    self.printed: int | None = None  # count on the last printed line
    self.lock, self.ended = threading.Lock(), threading.Event()
    threading.Thread(target=self._watch, name=f"progress of {title}", daemon=True).start()

  def advance(self, n: int = 1, **fields: object) -> None:
    self.done += n
    self.fields = {**self.fields, **fields}  # the thread reads it
    self._print_if_due()

  def print(self, *values: object) -> None:
    self.show(" ".join(map(printable, values)))

  def finish(self) -> None:
    """Prints the last line, unless the work was short."""
    self.stop()
    now = time.monotonic()
    if now - self.began >= QUIET_SECONDS and (not self._counts() or self.printed != self.done):
      self.show_last(self._line(now, ended=True))

  def stop(self) -> None:
    """Prints no further lines."""
    self.ended.set()
    with self.lock:  # a line that is being printed
      pass

  def _watch(self) -> None:
    """Prints lines that are due while `advance` is not called."""
    while not self.ended.wait(0.25):
      if self.reveal is not None and time.monotonic() - self.began > REVEALED_SECONDS:
        reveal, self.reveal = self.reveal, None
        reveal()
      self._print_if_due()

  def _print_if_due(self) -> None:
    now = time.monotonic()
    if self.paused or now < self.next_time or not self.lock.acquire(blocking=False):
      return
    try:
      if not self.ended.is_set():
        self.next_time = now + min(max(now - self.began, QUIET_SECONDS), MOST_SILENCE)
        self.printed = self.done
        self.show(self._line(now))
    finally:
      self.lock.release()

  def _counts(self) -> bool:
    return self.total is not None or bool(self.unit)

  def _line(self, now: float, ended: bool = False) -> str:
    elapsed = now - self.began
    parts = [progress_text(self.done, self.total, self.unit), duration(elapsed)]
    if not self._counts():
      parts = [f"{'done in' if ended else ''} {duration(elapsed)}".strip()]
    left = time_left(elapsed, self.done - self.start, self.total - self.start) if self.total is not None else ""
    fields = f"  {fields_text(self.fields)}" if self.fields else ""
    return f"{self.title}: {', '.join(parts)}{left}{fields}"


class DrawnBar:
  """A bar drawn in place in a terminal. `lines` writes to the log. An `inner` bar appears after a moment."""

  def __init__(self, display: Progress, lines: LineBar, show: Callable[..., None], inner: bool = False):
    self.display, self.lines, self.show, self.fields = display, lines, show, dict[str, object]()
    self.task = display.add_task(
      printable(lines.title), total=lines.total, completed=lines.start, unit=lines.unit, fields=self.fields,
      visible=not inner,
    )  # fmt: skip
    if inner:
      lines.reveal = self._reveal

  def _reveal(self) -> None:
    with contextlib.suppress(KeyError):  # it has ended in the meantime
      self.display.update(self.task, visible=True)

  def advance(self, n: int = 1, **fields: object) -> None:
    self.fields.update(fields)  # read by the display a few times per second
    self.display.advance(self.task, n)
    self.lines.advance(n, **fields)

  def print(self, *values: object) -> None:
    self.show(*values)

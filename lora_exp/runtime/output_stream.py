"""Standard output and standard error whose failures cannot end a run.

A reader may close a pipe (`| head`) or never read it, a terminal may be closed, a disk may be full, and an encoding may
lack characters. Text is then lost or replaced; the run goes on, and its log has everything.
"""

import codecs
import io
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHUNK = 4096  # bytes that a pipe accepts without blocking once it is writable (PIPE_BUF)
MOST_PENDING = 1 << 20  # bytes kept for a reader that does not read
LAST_WAIT = 3.0  # seconds that such a reader is given at the end
READABLE = "lora_exp.readable"  # the error handler for characters that an encoding lacks
SPELLINGS = {
  "─": "-", "│": "|", "→": "->", "×": "x", "±": "+/-", "…": "...", "≤": "<=", "≥": ">=", "–": "-", "Δ": "d", "·": ".",
}  # fmt: skip

_without_waiting = 0  # the number of contexts in which a full pipe is not waited for


def _spelled(error: UnicodeError) -> tuple[str, int]:
  """Replaces characters by similar ones that every encoding has, or by a question mark."""
  assert isinstance(error, UnicodeEncodeError)
  return "".join(SPELLINGS.get(char, "?") for char in error.object[error.start : error.end]), error.end


codecs.register_error(READABLE, _spelled)


class TolerantStream(io.TextIOBase):
  """A text stream like `stream` that never raises. `lost` is set once nothing can be written any more."""

  def __init__(self, stream: Any):
    self.stream, self.lost = stream, stream is None
    self.descriptor = _descriptor(stream)
    self.pending = bytearray()  # not yet written
    self.lock = threading.RLock()

  @property
  def encoding(self) -> str:  # type: ignore[override]
    return getattr(self.stream, "encoding", None) or "utf-8"

  @property
  def errors(self) -> str:  # type: ignore[override]
    return READABLE

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stream, name)

  def fileno(self) -> int:
    if self.stream is None:
      raise io.UnsupportedOperation("fileno")
    return int(self.stream.fileno())

  def isatty(self) -> bool:
    try:
      return self.stream is not None and bool(self.stream.isatty())
    except ValueError:  # closed
      return False

  def writable(self) -> bool:
    return True

  def write(self, text: str) -> int:
    """Writes all of `text` at once, or as much as the reader takes."""
    with self.lock:
      try:
        if not self.lost:
          self._write(text)
      except (OSError, ValueError):
        self._give_up()
    return len(text)

  def flush(self) -> None:
    """Writes what is pending, as far as the reader takes it."""
    with self.lock:
      try:
        if not self.lost and self.descriptor is None:
          self.stream.flush()
        elif not self.lost:
          self._drain(0.0 if _without_waiting else None)
      except (OSError, ValueError):
        self._give_up()

  def finish(self, seconds: float = LAST_WAIT) -> None:
    """Writes what is pending; a reader that does not read is given some seconds, and then the text is lost."""
    with self.lock:
      try:
        self._drain(seconds)
      except (OSError, ValueError):
        self._give_up()
      self.pending.clear()

  def close(self) -> None:
    """Does nothing: the underlying stream is not ours."""

  def _write(self, text: str) -> None:
    data = text.encode(self.encoding, READABLE)
    if self.descriptor is None:
      self.stream.write(data.decode(self.encoding))
      return
    self.stream.flush()  # what others have written to it
    self.pending += data
    self._drain(0.0 if _without_waiting else None)
    if len(self.pending) > MOST_PENDING:
      del self.pending[:-MOST_PENDING]

  def _drain(self, seconds: float | None) -> None:
    """Writes pending bytes for at most `seconds` of waiting; None: until all are written."""
    if self.descriptor is None:
      return
    end = None if seconds is None else time.monotonic() + seconds
    poll = select.poll()
    poll.register(self.descriptor, select.POLLOUT)
    while self.pending:
      wait = None if end is None else max(0.0, end - time.monotonic())
      if not poll.poll(None if wait is None else wait * 1000):
        return
      chunk = bytes(self.pending[:CHUNK])
      del self.pending[: len(chunk)]  # before writing, because a signal handler may print
      try:
        written = os.write(self.descriptor, chunk)
      except BlockingIOError:
        written = 0
        time.sleep(0.01)
      self.pending[:0] = chunk[written:]

  def _give_up(self) -> None:
    """Discards all text from now on, also what other writers of the file descriptor write."""
    self.lost = True
    self.pending.clear()
    if self.descriptor is not None:
      null = os.open(os.devnull, os.O_WRONLY)
      os.dup2(null, self.descriptor)
      os.close(null)


def _descriptor(stream: Any) -> int | None:
  """The file descriptor of a real file, pipe or terminal; None for streams of notebooks and tests."""
  buffer = getattr(stream, "buffer", None)
  if not isinstance(getattr(buffer, "raw", buffer), io.FileIO):
    return None
  try:
    return int(stream.fileno())
  except (OSError, ValueError):
    return None


@contextmanager
def tolerant_output() -> Iterator[None]:
  """Context in which sys.stdout and sys.stderr are tolerant streams."""
  before = sys.stdout, sys.stderr
  sys.stdout, sys.stderr = (x if isinstance(x, TolerantStream) else TolerantStream(x) for x in before)
  try:
    yield
  finally:
    for stream, old in zip((sys.stdout, sys.stderr), before, strict=True):
      if isinstance(stream, TolerantStream) and stream is not old:
        stream.finish()
    sys.stdout, sys.stderr = before


@contextmanager
def without_waiting() -> Iterator[None]:
  """Context in which text that the reader of a pipe does not read is kept, so that writing does not block training."""
  global _without_waiting
  _without_waiting += 1
  try:
    yield
  finally:
    _without_waiting -= 1


def output_lost() -> bool:
  """Whether nobody can read standard output any more."""
  return isinstance(sys.stdout, TolerantStream) and sys.stdout.lost


def open_closed_descriptors() -> None:
  """Opens /dev/null where standard streams were closed, so that no file of a run gets their descriptors."""
  for descriptor in (0, 1, 2):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor

"""Writes the checkpoints of a pack's trials in a thread while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self


class BackgroundSaves:
  """Calls functions one after another in a thread. The end of its context waits for all of them."""

  def __init__(self) -> None:
    self._pool = ThreadPoolExecutor(1, "save")  # orbax shares an event loop: two saves at once fail
    self._pending: list[Future[None]] = []

  def submit(self, save: Callable[[], None]) -> None:
    """Calls `save` in the thread, after the earlier ones."""
    self._pending.append(self._pool.submit(save))

  def wait(self) -> None:
    """Waits for all calls. Raises the first error, after all calls have ended."""
    pending, self._pending = self._pending, []
    errors = [future.exception() for future in pending]
    for error in errors:
      if error is not None:
        raise error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    """Waits, also after an error. An error of a save replaces it, because a stopped run says that it saved one."""
    try:
      self.wait()
    finally:
      self._pool.shutdown()

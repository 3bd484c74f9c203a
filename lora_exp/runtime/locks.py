"""File locks (flock). A lock is released when its process ends, even if it is killed."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config.errors import InUseError
from lora_exp.runtime.run_files import LOCK


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
  """Holds an exclusive lock on the file `path`, which is created if missing; yields whether the lock was acquired.

  Without `wait`, it yields False immediately if another process holds the lock. The lock file is never deleted, because
  two processes could then lock two different files of the same name.
  """
  with path.open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
      return
    yield True


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
  """Holds the lock of a run or sweep directory; raises InUseError if another process holds it."""
  with file_lock(directory / LOCK, wait=False) as acquired:
    if not acquired:
      raise InUseError(f"{directory}: another process is training here; wait for it, or stop it first")
    yield

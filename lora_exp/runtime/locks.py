"""File locks. A lock is released when its process ends, even if it is killed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_exp.config.errors import InUseError
from lora_exp.runtime.run_files import LOCK


@contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
  """Holds an exclusive lock on the file `path`, which is created if missing; yields whether the lock was acquired.

  Without `wait`, it yields False immediately if another process holds the lock. The lock file is never deleted, because
  two processes could then lock two different files of the same name.
  """
  lock = FileLock(path, timeout=-1 if wait else 0)
  try:
    lock.acquire()
  except Timeout:
    yield False
    return
  try:
    yield True
  finally:
    lock.release()


def is_locked(directory: Path) -> bool:
  """Whether a process holds the lock of a run or sweep directory. Creates no file."""
  path = directory / LOCK
  if not path.is_file():
    return False
  with file_lock(path, wait=False) as acquired:
    return not acquired


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
  """Holds the lock of a run or sweep directory; raises InUseError if another process holds it."""
  with file_lock(directory / LOCK, wait=False) as acquired:
    if not acquired:
      raise InUseError(f"{directory}: another process is training here; wait for it, or stop it first")
    yield

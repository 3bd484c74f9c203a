"""The run directory: claimed before anything runs, locked while it trains, taken away again if nothing was trained."""

import errno
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config.errors import DiskError, InputError, InUseError

MARKS = ("config.yaml", "metrics.jsonl", "checkpoints", "multirun.yaml")  # of a directory that holds a run or a sweep
TRAINED = ("metrics.jsonl", "checkpoints", ".submitit")  # of a run in which training began, or that waits in a queue
LOCK = ".lock"


@dataclass
class Claim:
  """A directory that this process may write, and what was there before."""

  path: Path
  made: Path | None  # the topmost directory that was made for it; None: it existed
  before: frozenset[str] = frozenset()  # what it held

  def undo(self) -> None:
    """Takes away what was made here, the directory and its empty parents too, unless training began."""
    entries = [entry for entry in _entries(self.path) if entry.name not in self.before]
    if any(found for entry in entries for mark in TRAINED for found in (entry.name == mark, *entry.glob(f"**/{mark}"))):
      return
    for entry in entries:
      if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
      else:
        entry.unlink()
    for directory in (self.path, *self.path.parents) if self.made else ():
      if directory.is_dir() and not _entries(directory):
        directory.rmdir()
      if directory == self.made:
        break


def _entries(directory: Path) -> list[Path]:
  return list(directory.iterdir()) if directory.is_dir() else []


LEDGER = "sweep.jsonl"  # of a sweep that can go on


def claim(path: Path, typed: bool, sweep: bool = False) -> Claim:
  """Makes `path`, or `path`-2, -3, … if another run was quicker; a `typed` path is taken as it is.

  A sweep may go on in the directory of one (`sweep`).

  Raises InUseError if a typed path holds a run, InputError if it cannot be made, DiskError if the disk is full.
  """
  try:
    return _claim(path.absolute(), typed, sweep)
  except OSError as error:
    raise write_error(error, path.absolute()) from error


def _claim(path: Path, typed: bool, sweep: bool) -> Claim:
  if typed and path.is_dir():
    names = frozenset(entry.name for entry in _entries(path))
    if sweep and LEDGER in names:
      return Claim(path, None, names)
    if held := sorted(names & set(MARKS)):
      raise InUseError(f"{path}: holds a run already ({held[0]}); choose another directory, "
                       f"or go on with that run: train.resume={path}")
    (path / LOCK).touch()
    return Claim(path, None, names)
  missing = [parent for parent in path.parents if not parent.exists()]
  path.parent.mkdir(parents=True, exist_ok=True)
  for n in itertools.count(1):
    attempt = path if n == 1 else path.with_name(f"{path.name}-{n}")
    try:
      attempt.mkdir()
      return Claim(attempt, missing[-1] if missing else attempt)
    except FileExistsError:
      if typed:
        raise
  raise AssertionError


def is_disk_error(error: OSError) -> bool:
  """Whether the disk is full, over its quota, or broken."""
  return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def write_error(
  error: OSError, path: Path, setting: str = "the run's own directory is hydra.run.dir=DIR"
) -> InputError | DiskError:
  """The error to raise instead of `error`, met while writing to `path`."""
  if is_disk_error(error):
    return DiskError(f"{path}: {os.strerror(error.errno or 0)}; make room, or use another disk")
  why = "a file is in the way" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
  return InputError(f"{path}: {why}; give another path ({setting})")


@contextmanager
def locked(directory: Path) -> Iterator[None]:
  """Holds the directory's lock; raises InUseError if another process does. The lock ends with the process."""
  with (directory / LOCK).open("a") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InUseError(f"{directory}: another process is training here; wait for it, or stop it first") from error
    yield

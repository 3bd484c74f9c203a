"""What is expensive is made once: a directory named by the hash of what made it.

`get_or_make` writes under a temporary name and renames, so that a directory that exists is complete. A lock lets one
process make it while the others wait, and tells a maker that is still alive from one that died: a temporary whose lock
is free belongs to nobody and is removed.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config.errors import DiskError, InputError

NAME_DIGITS = 32  # hex digits of the key that name a directory: 128 bits


def fingerprint(**parts: object) -> str:
  """SHA-256 (hex) of the parts as canonical JSON; the order of names does not matter. TypeError for what JSON lacks."""
  text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def get_or_make(root: str | Path, kind: str, key: str, make: Callable[[Path], None]) -> Path:
  """The directory `root/kind/key[:32]`; if it is absent, `make(directory)` fills it, once for all processes.

  `root` may start with `~`. If `make` raises, nothing is left behind and the error goes on.
  Raises DiskError if the disk is full, InputError if `root` cannot be written to.
  """
  folder = Path(root).expanduser() / kind
  final = folder / key[:NAME_DIGITS]
  if final.is_dir():
    return final
  with _explained(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(_lock_of(final)):
      if not final.is_dir():
        _remove_stale(folder)
        _make(final, make)
  return final


def _make(final: Path, make: Callable[[Path], None]) -> None:
  temporary = final.with_name(f".{final.name}.tmp")
  shutil.rmtree(temporary, ignore_errors=True)  # whoever left it is dead: the lock is ours
  temporary.mkdir()
  try:
    make(temporary)
    sync_all(temporary)
    temporary.rename(final)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  to_disk(final.parent)


def _lock_of(final: Path) -> Path:
  return final.with_name(f".{final.name}.lock")


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
  """Hold the lock file; yields whether it was got. The file stays: removing it would let two processes hold it."""
  with open(path, "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
      yield False
      return
    yield True


def _remove_stale(folder: Path) -> None:
  for temporary in folder.glob(".*.tmp"):
    final = folder / temporary.name.removeprefix(".").removesuffix(".tmp")
    with _locked(_lock_of(final), wait=False) as dead:
      if dead:
        shutil.rmtree(temporary, ignore_errors=True)


def sync_all(directory: Path) -> None:
  """`to_disk` of everything in `directory`."""
  for parent, _, names in os.walk(directory):
    for name in names:
      to_disk(Path(parent) / name)
    to_disk(Path(parent))


def to_disk(path: Path) -> None:
  """Waits until the file, or the list of a directory's entries, is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
  """Say in words which of the disk's errors stopped the making."""
  try:
    yield
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
      raise DiskError(f"cannot write to {folder}: {error.strerror}; free some space there or set cache=") from error
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
      raise InputError(f"the cache {folder} cannot be written to: {error.strerror}; set cache=") from error
    raise

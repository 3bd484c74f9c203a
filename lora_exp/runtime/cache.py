"""The cache of expensive results. Each entry is a directory named by the hash of its inputs.

`get_or_make` writes to a temporary directory and renames it, so an existing entry is complete. A file lock lets one
process compute an entry while others wait. A temporary directory with a free lock was left by a dead process and is
removed.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_exp.config.errors import DiskError, InputError
from lora_exp.runtime.disk_errors import is_disk_error
from lora_exp.runtime.files import sync_path, sync_tree, temporary_path
from lora_exp.runtime.locks import file_lock

PROGRAMS = "programs"  # directory of JAX's compilation cache, whose entries are files
NAME_DIGITS = 32  # hex digits of the key in a directory's name: 128 bits
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def fingerprint(**parts: object) -> str:
  """SHA-256 (hex) of the parts as canonical JSON, independent of the order of names.

  Raises TypeError for a value that JSON cannot represent.
  """
  text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def get_or_make(root: str | Path, kind: str, key: str, make: Callable[[Path], None]) -> Path:
  """Returns the directory `root/kind/key[:32]`. If it is missing, `make(directory)` fills it, once for all processes.

  `root` may start with `~`. If `make` raises, the entry is removed and the error propagates.
  Raises DiskError if the disk is full, InputError if `root` cannot be written to.
  """
  folder = Path(root).expanduser() / kind
  final = folder / key[:NAME_DIGITS]
  if final.is_dir():
    _mark_as_used(final)
    return final
  with _cache_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(lock_path(final)):
      if not final.is_dir():
        _remove_abandoned(folder)
        _make(final, make)
  return final


def _mark_as_used(final: Path) -> None:
  """Sets the time of the directory, by which `task=clean` finds old entries."""
  with suppress(OSError):  # a shared cache may be read-only
    os.utime(final)


def _make(final: Path, make: Callable[[Path], None]) -> None:
  temporary = temporary_path(final)
  shutil.rmtree(temporary, ignore_errors=True)  # this process holds the lock, so its last owner is dead
  temporary.mkdir()
  try:
    make(temporary)
    sync_tree(temporary)
    temporary.rename(final)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  sync_path(final.parent)


def lock_path(final: Path) -> Path:
  """The lock of an entry, which is never deleted."""
  return final.with_name(f".{final.name}.lock")


def _remove_abandoned(folder: Path) -> None:
  """Removes temporary directories of processes that died."""
  for temporary in folder.glob(".*.tmp"):
    final = folder / temporary.name.removeprefix(".").removesuffix(".tmp")
    with file_lock(lock_path(final), wait=False) as abandoned:
      if abandoned:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
  """Context that converts operating-system errors to errors that name the cache and the setting."""
  try:
    yield
  except OSError as error:
    if is_disk_error(error):
      raise DiskError(f"cannot write to {folder}: {error.strerror}; free some space there or set cache=") from error
    if error.errno in NOT_WRITABLE:
      raise InputError(f"the cache {folder} cannot be written to: {error.strerror}; set cache=") from error
    raise

"""The cache of expensive results. Each entry is a directory named by the hash of its inputs.

`get_or_make` writes to a temporary directory and renames it, so an existing entry is complete. A file lock lets one
process compute an entry while others wait. A temporary directory with a free lock was left by a dead process and is
removed.

    rows/015abd…/KEY          the whole hash of the inputs
    rows/015abd…/SHA256SUMS   checksums of all other files

Checksums are compared when a process opens an entry. A damaged entry is renamed to NAME.damaged and created again. An
entry from a version without checksums gets them when it is first opened.
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
from lora_exp.runtime.checksums import SUMS, damage, write_sums
from lora_exp.runtime.console import show_warning
from lora_exp.runtime.disk_errors import is_disk_error
from lora_exp.runtime.files import sync_path, sync_tree, temporary_path
from lora_exp.runtime.locks import file_lock

PROGRAMS = "programs"  # directory of JAX's compilation cache, whose entries are files
NAME_DIGITS = 32  # hex digits of the key in a directory's name: 128 bits
KEY = "KEY"  # file with the whole key, so that an entry under the name of another one is noticed
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_verified: dict[Path, frozenset[tuple]] = {}  # names, sizes and times of the files of each verified entry


def fingerprint(**parts: object) -> str:
  """SHA-256 (hex) of the parts as canonical JSON, independent of the order of names.

  Raises TypeError for a value that JSON cannot represent.
  """
  text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()


def get_or_make(root: str | Path, kind: str, key: str, make: Callable[[Path], None]) -> Path:
  """Returns the directory `root/kind/key[:32]`. If it is missing, `make(directory)` fills it, once for all processes.

  `root` may start with `~`. If `make` raises, the entry is removed and the error propagates. A damaged entry is set
  aside with a warning, and made again.
  Raises DiskError if the disk is full, InputError if `root` cannot be written to.
  """
  folder = Path(root).expanduser() / kind
  final = folder / key[:NAME_DIGITS]
  if final.is_dir() and not _entry_damage(final, key):
    _mark_as_used(final)
    return final
  with _cache_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(lock_path(final)):
      if final.is_dir() and (reason := _entry_damage(final, key)):
        _set_aside(final, reason)
      if not final.is_dir():
        _remove_abandoned(folder)
        _make(final, key, make)
  return final


def _mark_as_used(final: Path) -> None:
  """Sets the time of the directory, by which `task=clean` finds old entries."""
  with suppress(OSError):  # a shared cache may be read-only
    os.utime(final)


def _make(final: Path, key: str, make: Callable[[Path], None]) -> None:
  temporary = temporary_path(final)
  shutil.rmtree(temporary, ignore_errors=True)  # this process holds the lock, so its last owner is dead
  temporary.mkdir()
  try:
    make(temporary)
    (temporary / KEY).write_text(key, encoding="utf-8")
    write_sums(temporary)
    sync_tree(temporary)
    temporary.rename(final)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)
  sync_path(final.parent)


def _entry_damage(entry: Path, key: str) -> str:
  """How the entry differs from what was written; '' if it does not. Files that did not change are read only once."""
  try:
    files = _file_states(entry)
    if _verified.get(entry) == files:
      return ""
    if not (entry / SUMS).is_file():
      if (entry / KEY).is_file():
        return f"missing: {SUMS}"
      with suppress(OSError):  # made by a version without checksums; the cache may be read-only
        write_sums(entry)
      return ""
    recorded = (entry / KEY).read_bytes().decode(errors="replace") if (entry / KEY).is_file() else key
    reason = damage(entry) or ("" if recorded == key else "it was renamed")
    if not reason:
      _verified[entry] = files
    return reason
  except OSError as error:
    return str(error)


def _file_states(entry: Path) -> frozenset[tuple]:
  """The name, size and times of every file below `entry`."""
  states = ((path, path.stat()) for path in entry.rglob("*"))
  return frozenset((str(path), state.st_size, state.st_mtime_ns, state.st_ino) for path, state in states)


def _set_aside(entry: Path, reason: str) -> None:
  """Renames a damaged entry to NAME.damaged, in place of an earlier one."""
  damaged = entry.with_name(f"{entry.name}.damaged")
  shutil.rmtree(damaged, ignore_errors=True)
  entry.rename(damaged)
  show_warning(f"the cache entry {entry} is damaged ({reason}); it is renamed to {damaged.name} and created again")


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

"""The entries of the cache with their sizes and times of last use, and their removal."""

import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_exp.runtime.byte_sizes import size_of
from lora_exp.runtime.cache import NAME_DIGITS, PROGRAMS, lock_path
from lora_exp.runtime.files import temporary_path
from lora_exp.runtime.locks import file_lock

DAY = 86400.0  # seconds


@dataclass(frozen=True)
class CacheEntry:
  """An entry of the cache: a directory, or the file of one compiled program."""

  path: Path
  size: int  # bytes
  used: float  # last use, seconds since 1970

  @property
  def kind(self) -> str:
    return self.path.parent.name

  @property
  def days(self) -> float:
    """Days since its last use."""
    return max(0.0, time.time() - self.used) / DAY


def cache_entries(root: Path) -> list[CacheEntry]:
  """Every complete entry of the cache in `root`, the least recently used first."""
  entries = []
  for kind in sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ():
    for path in kind.iterdir():
      if _is_entry(path):
        stat = path.stat()
        entries.append(CacheEntry(path, size_of(path), max(stat.st_mtime, 0 if path.is_dir() else stat.st_atime)))
  return sorted(entries, key=_used)


def _is_entry(path: Path) -> bool:
  """Whether the cache wrote `path`, so that nothing else is deleted if `cache` is a directory with other files."""
  if path.is_dir():
    return re.fullmatch(rf"[0-9a-f]{{{NAME_DIGITS}}}(\.damaged)?", path.name) is not None and _lock(path).is_file()
  return path.parent.name == PROGRAMS and path.name.startswith("jit") and path.name.endswith(("-cache", "-atime"))


def _lock(path: Path) -> Path:
  """The lock of an entry; a damaged entry that was set aside has that of its replacement."""
  return lock_path(path.with_name(path.name.removesuffix(".damaged")))


def _used(entry: CacheEntry) -> float:
  return entry.used


def entries_over_limit(entries: Sequence[CacheEntry], limit: int) -> list[CacheEntry]:
  """The least recently used entries to remove so that the others take at most `limit` bytes."""
  excess = sum(entry.size for entry in entries) - limit
  over = []
  for entry in entries:
    if excess <= 0:
      break
    over.append(entry)
    excess -= entry.size
  return over


def remove_entry(entry: CacheEntry) -> bool:
  """Removes an entry, unless a process is making it. Returns whether it is gone.

  A directory is renamed first, so that no process sees a part of it.
  """
  if not entry.path.is_dir():
    entry.path.unlink(missing_ok=True)
    return True
  with file_lock(_lock(entry.path), wait=False) as acquired:
    if not acquired:
      return False
    temporary = temporary_path(entry.path)
    shutil.rmtree(temporary, ignore_errors=True)
    entry.path.rename(temporary)
    shutil.rmtree(temporary)
  return True

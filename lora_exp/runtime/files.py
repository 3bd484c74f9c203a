"""Atomic writes, which leave a file complete or unchanged, and checks of given paths."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lora_exp.config.errors import did_you_mean


def temporary_path(path: Path) -> Path:
  """The hidden sibling of `path` that is written and then renamed."""
  return path.with_name(f".{path.name}.tmp")


def _umask() -> int:
  """The permissions that this process withholds from new files, which can only be read by setting them."""
  mask = os.umask(0o077)
  os.umask(mask)
  return mask


MODE = 0o666 & ~_umask()  # of new files; read once, because setting the mask would affect other threads


def write_atomically(path: Path, write: Callable[[Path], object], durable: bool = False) -> None:
  """Calls `write(temporary)` and renames the temporary file to `path`, so that readers never see a partial file.

  The file has the permissions that the umask allows, although some libraries write files that only the owner may read.
  With `durable`, content and directory entry are synced to disk before it returns. If `write` fails, `path` is
  unchanged and the temporary file is removed.
  """
  temporary = temporary_path(path)
  try:
    write(temporary)
    temporary.chmod(MODE)
    if durable:
      sync_path(temporary)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  if durable:
    sync_path(path.parent)


def write_text_atomically(path: Path, text: str, durable: bool = False) -> None:
  """`write_atomically` for a UTF-8 text file."""

  def write(temporary: Path) -> None:
    temporary.write_text(text, encoding="utf-8")

  write_atomically(path, write, durable)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
  """`write_atomically` for a JSON object, indented by two spaces."""
  write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def sync_path(path: Path) -> None:
  """Syncs the content of a file, or the entries of a directory, to disk (fsync)."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_tree(directory: Path) -> None:
  """`sync_path` for `directory` and everything below it."""
  for parent, _, names in os.walk(directory):
    for name in names:
      sync_path(Path(parent) / name)
    sync_path(Path(parent))


PATH_KINDS = ((stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"),
              (stat.S_ISFIFO, "a pipe, which can be read only once"))


def path_problem(setting: str, value: str) -> str | None:
  """Why the path given by `setting` is neither a file nor a directory that can be read, or None."""
  path = Path(value)
  try:
    mode = path.stat().st_mode
  except (FileNotFoundError, NotADirectoryError):
    near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
    return f"{setting}={value}: no such file{near}"
  except OSError as error:
    return f"{setting}={value}: cannot be read ({(error.strerror or str(error)).lower()})"
  for is_kind, words in PATH_KINDS:
    if is_kind(mode):
      return f"{setting}={value}: is {words}; write its content to a file and give that"
  if not os.access(path, os.R_OK):
    return f"{setting}={value}: cannot be read (permission denied)"
  return None


def file_problem(setting: str, value: str) -> str | None:
  """Why the file given by `setting` cannot be read, or None."""
  problem = path_problem(setting, value)
  if problem is None and Path(value).is_dir():
    return f"{setting}={value}: is a directory; give a file"
  return problem

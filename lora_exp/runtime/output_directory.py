"""Atomic creation of an output directory."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.config.errors import InUseError
from lora_exp.runtime.disk_errors import write_error
from lora_exp.runtime.files import sync_tree, temporary_path


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
  """Context with a temporary directory that is renamed to `out` at the end; `out` must be missing or empty.

  Raises InputError or DiskError if it cannot be written, and InUseError if another process is writing it. The temporary
  directory is removed in that case, as are those of killed processes.
  """
  temporary, parent_existed = temporary_path(out), out.parent.exists()
  try:
    temporary.mkdir(parents=True, exist_ok=True)
    with _locked(temporary):
      try:
        for file in temporary.iterdir():
          file.unlink()
        yield temporary
        sync_tree(temporary)
        temporary.replace(out)
      finally:
        shutil.rmtree(temporary, ignore_errors=True)
  except OSError as error:
    raise write_error(error, out, "out=DIR says where it goes") from error
  finally:
    if not parent_existed and out.parent.is_dir() and not any(out.parent.iterdir()):
      out.parent.rmdir()


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
  """Holds a lock on the directory itself, which is released with the process at the latest."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  except BlockingIOError as error:
    raise InUseError(f"{directory}: another process is writing here; wait for it, or choose another out=") from error
  finally:
    os.close(descriptor)

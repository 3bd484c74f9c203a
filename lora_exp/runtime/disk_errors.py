"""Conversion of operating-system write errors to errors that say what to do."""

import errno
import os
from pathlib import Path

from lora_exp.config.errors import DiskError, InputError

RUN_DIRECTORY_SETTING = "the run's own directory is hydra.run.dir=DIR"


def is_disk_error(error: OSError) -> bool:
  """Whether the disk is full, over its quota, or broken."""
  return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def write_error(error: OSError, path: Path, setting: str = RUN_DIRECTORY_SETTING) -> InputError | DiskError:
  """The error to raise instead of `error`, from writing to `path`; `setting` says how to choose another path."""
  if is_disk_error(error):
    return DiskError(f"{path}: {os.strerror(error.errno or 0)}; free some space, or use another disk")
  if path.is_symlink() and not path.exists():
    return InputError(f"{path}: is a link to {os.readlink(path)}, which does not exist; remove the link, or create "
                      f"that directory ({setting})")
  reason = "a file is in the way" if error.errno in (errno.EEXIST, errno.ENOTDIR) else error.strerror
  return InputError(f"{path}: {reason}; give another path ({setting})")

"""Printing of errors, and their exit codes."""

import os
import traceback
from pathlib import Path

from lora_exp.config.errors import BUG, InputError, LoraExpError, StoppedError
from lora_exp.runtime.console import show_error, show_warning
from lora_exp.runtime.disk_errors import is_disk_error, write_error

MOST_PROBLEMS = 20  # maximum number of problems shown for one error


def report_error(error: LoraExpError | OSError, full_error: bool) -> int:
  """Prints an error and returns its exit code. With `full_error` (HYDRA_FULL_ERROR=1) prints the traceback too.

  An OSError without a file name is a bug, unless the disk is full or broken.
  """
  if full_error:
    traceback.print_exception(error)
  if isinstance(error, OSError):
    if error.filename is None and not is_disk_error(error):
      if not full_error:
        traceback.print_exception(error)
      return BUG
    error = write_error(error, Path(os.fsdecode(error.filename or ".")))
  if isinstance(error, StoppedError):
    show_warning(str(error))
  else:
    show_error(_shortened(error))
  return error.code


def _shortened(error: LoraExpError) -> LoraExpError:
  """Returns `error` with at most MOST_PROBLEMS problems."""
  if not isinstance(error, InputError) or len(error.problems) <= MOST_PROBLEMS:
    return error
  more = len(error.problems) - MOST_PROBLEMS
  return InputError([*error.problems[:MOST_PROBLEMS], f"and {more} more"])

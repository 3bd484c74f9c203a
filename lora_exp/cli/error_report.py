"""Printing of errors, and their exit codes."""

import os
import traceback
from pathlib import Path

from lora_exp.config.errors import BUG, InputError, LoraExpError, LostProcessError, StoppedError
from lora_exp.runtime.console import show_error, show_warning
from lora_exp.runtime.disk_errors import is_disk_error, write_error

MOST_PROBLEMS = 20  # maximum number of problems shown for one error
MOST_LETTERS = 1200  # of all problems together: they fit on a screen of 80 columns
LEAST_LETTERS = 160  # of one problem


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
  if isinstance(error, StoppedError) and not isinstance(error, LostProcessError):
    show_warning(str(error))
  else:
    show_error(_shortened(error))
  return error.code


def _shortened(error: LoraExpError) -> LoraExpError:
  """Returns `error` with at most MOST_PROBLEMS problems, the long ones shortened in the middle."""
  if not isinstance(error, InputError):
    return error
  problems, more = error.problems[:MOST_PROBLEMS], len(error.problems) - MOST_PROBLEMS
  longest = max(LEAST_LETTERS, MOST_LETTERS // len(problems)) if problems else 0
  half = longest // 2
  shortened = [text if len(text) <= longest else f"{text[:half]} … {text[-half:]}" for text in problems]
  return InputError([*shortened, f"and {more} more"] if more > 0 else shortened)

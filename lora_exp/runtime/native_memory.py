"""Releases memory that the C library keeps after it was freed."""

import ctypes
import sys


def release_freed_memory() -> None:
  """Returns freed memory of the C library to the system; does nothing where the library cannot (all but glibc).

  XLA's compiler frees most of the memory that it used, but glibc keeps it: several hundred megabytes for a deep model.
  """
  if not sys.platform.startswith("linux"):
    return
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
  if trim is not None:
    trim(0)

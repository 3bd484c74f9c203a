"""The process state that `hydra.main` reads, set for one call and restored afterwards."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hydra_arguments(argv: list[str]) -> Iterator[None]:
  """Context in which `sys.argv` has the arguments `argv`."""
  before = sys.argv
  sys.argv = [before[0], *argv]
  try:
    yield
  finally:
    sys.argv = before


@contextmanager
def raising_hydra_errors() -> Iterator[None]:
  """Context in which Hydra raises its errors instead of printing them and exiting."""
  before = os.environ.get("HYDRA_FULL_ERROR")
  os.environ["HYDRA_FULL_ERROR"] = "1"
  try:
    yield
  finally:
    if before is None:
      del os.environ["HYDRA_FULL_ERROR"]
    else:
      os.environ["HYDRA_FULL_ERROR"] = before

"""What `hydra.main` reads from the process, set for one call and restored afterwards."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hydra_arguments(argv: list[str]) -> Iterator[None]:
  """`sys.argv` with `argv` in place of what was typed."""
  before = sys.argv
  sys.argv = [before[0], *argv]
  try:
    yield
  finally:
    sys.argv = before


@contextmanager
def raising_hydra_errors() -> Iterator[None]:
  """Hydra raises its errors instead of printing them and exiting."""
  before = os.environ.get("HYDRA_FULL_ERROR")
  os.environ["HYDRA_FULL_ERROR"] = "1"
  try:
    yield
  finally:
    if before is None:
      del os.environ["HYDRA_FULL_ERROR"]
    else:
      os.environ["HYDRA_FULL_ERROR"] = before

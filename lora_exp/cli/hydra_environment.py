"""The process state that `hydra.main` reads, set for one call and restored afterwards."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType


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


@contextmanager
def inherited_files_hidden() -> Iterator[None]:
  """Hydra lists no file whose name begins with _, as conf/lora/_base.yaml: others inherit it, and it is no choice.

  That holds for --help, tab completion and lora=glob(*).
  """
  every_option = ConfigRepository.get_group_options

  def choices(
    self: ConfigRepository, group_name: str, results_filter: ObjectType | None = ObjectType.CONFIG
  ) -> list[str]:
    return [name for name in every_option(self, group_name, results_filter) if not name.startswith("_")]

  ConfigRepository.get_group_options = choices  # type: ignore[method-assign]
  try:
    yield
  finally:
    ConfigRepository.get_group_options = every_option  # type: ignore[method-assign]

"""The process state that `hydra.main` reads, set for one call and restored afterwards."""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml
from hydra._internal.config_repository import ConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from omegaconf import DictConfig, ListConfig, OmegaConf

from lora_exp.runtime.yaml_text import check_size

_PARSED: dict[str, DictConfig | ListConfig] = {}  # by the text of the file, because Hydra reads all files for every job


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
def files_measured() -> Iterator[None]:
  """Context in which Hydra refuses a config file that is nested too deeply or too large (yaml.YAMLError).

  A file is also parsed only once. `OmegaConf.load` is replaced because Hydra reads every config file with it and offers
  no other place between a file and its parser: its source for `file://` cannot be registered a second time.
  """
  load = OmegaConf.load

  def measured_load(file: str | Path | IO[Any]) -> DictConfig | ListConfig:
    if isinstance(file, str | Path):
      text = Path(file).read_text(encoding="utf-8")
    else:
      text = file.read()
      file.seek(0)
    if text not in _PARSED:
      try:
        check_size(text)
      except yaml.YAMLError as error:
        name = getattr(file, "name", file)
        message = str(error).replace("<unicode string>", str(name))
        raise yaml.YAMLError(message if str(name) in message else f"{name}: {message}") from error
      _PARSED[text] = load(file)
    return copy.deepcopy(_PARSED[text])

  OmegaConf.load = staticmethod(measured_load)  # type: ignore[method-assign, assignment]
  try:
    yield
  finally:
    OmegaConf.load = staticmethod(load)  # type: ignore[method-assign, assignment]


@contextmanager
def config_store_not_copied() -> Iterator[None]:
  """Context in which Hydra does not copy its `ConfigStore`, which holds the configs of all plugins.

  For every group that --help lists, Hydra copies its repository of configs, and the store with it. With many plugins,
  this takes most of the time. The copies are not needed, because `ConfigStore.load` returns a copy of each config.
  """

  def shared(store: ConfigStore, memo: dict[int, Any]) -> ConfigStore:
    return store

  ConfigStore.__deepcopy__ = shared  # type: ignore[attr-defined]
  try:
    yield
  finally:
    del ConfigStore.__deepcopy__  # type: ignore[attr-defined]


@contextmanager
def inherited_files_hidden() -> Iterator[None]:
  """Context in which Hydra does not list files whose names begin with _, such as conf/lora/_base.yaml.

  Other files inherit from them, but they are not choices: --help, tab completion and lora=glob(*) leave them out.
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

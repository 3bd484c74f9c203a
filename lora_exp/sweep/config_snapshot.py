"""Reads config files once, so that every round of a sweep uses the same configs.

Hydra reads the files again for each job. A file that is edited while a sweep runs would change or break its later
rounds.
"""

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.plugins.config_source import ConfigResult


class ReadOnce(CachingConfigRepository):
  """A repository of config files whose copies share the files that were read. Hydra copies it for each job."""

  def load_config(self, config_path: str) -> ConfigResult | None:
    """Returns a copy of the file as it was first read, because Hydra merges settings into it."""
    return copy.deepcopy(super().load_config(config_path))

  def __deepcopy__(self, memo: dict[int, Any]) -> "ReadOnce":
    repository = ReadOnce(self.delegate)
    repository.cache = self.cache
    return repository


def read_files_once(loader: ConfigLoader) -> None:
  """Makes `loader` read each config file only once. It can be pickled with the files that it has read."""
  if isinstance(loader, ConfigLoaderImpl) and not isinstance(loader.repository, ReadOnce):
    loader.repository = ReadOnce(loader.repository)  # type: ignore[assignment]

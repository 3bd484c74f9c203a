"""Config files that are read once, so that every round of a sweep is composed of the same ones.

Hydra reads the files again for each job. A file that is edited while a sweep runs would change its later rounds, or
break them.
"""

import copy
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.plugins.config_source import ConfigResult


class ReadOnce(CachingConfigRepository):
  """A repository of config files whose copies share what was read. Hydra copies it for each job."""

  def load_config(self, config_path: str) -> ConfigResult | None:
    """A copy of the file as it was first read, because Hydra merges settings into it."""
    return copy.deepcopy(super().load_config(config_path))

  def __deepcopy__(self, memo: dict[int, Any]) -> "ReadOnce":
    twin = ReadOnce(self.delegate)
    twin.cache = self.cache
    return twin


def read_files_once(loader: ConfigLoader) -> None:
  """From now on, `loader` reads each config file once. It may be pickled with what it has read."""
  if isinstance(loader, ConfigLoaderImpl) and not isinstance(loader.repository, ReadOnce):
    loader.repository = ReadOnce(loader.repository)  # type: ignore[assignment]

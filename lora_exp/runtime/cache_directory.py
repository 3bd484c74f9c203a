"""The default directory of the cache."""

from pathlib import Path

import platformdirs

OLD_DEFAULT = Path("~/.cache/lora_exp")  # on every system, until version 0.1.0


def default_cache() -> str:
  """The user's cache directory of this system, such as ~/.cache/lora_exp; the old default if it exists."""
  old = OLD_DEFAULT.expanduser()
  return str(old if old.is_dir() else platformdirs.user_cache_path("lora_exp", appauthor=False))

"""Files as an older version would have written them."""

from pathlib import Path

import yaml

from lora_exp.config import Config
from lora_exp.runtime.saved_config import saved_settings


def save_as_older(cfg: Config, directory: Path) -> None:
  """Writes config.yaml as a version without task=bench would: the group `bench` is missing."""
  saved = saved_settings(cfg)
  del saved["bench"]
  (directory / "config.yaml").write_text(yaml.safe_dump(saved))

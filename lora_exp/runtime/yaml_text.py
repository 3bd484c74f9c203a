"""Parsing of YAML without Python objects, by libyaml if it is there."""

from typing import Any

import yaml

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of libyaml is ten times as fast


def safe_load(text: str) -> Any:
  """Parses a YAML document of plain values. Raises yaml.YAMLError."""
  return yaml.load(text, Loader=SAFE_LOADER)  # noqa: S506 - both loaders are safe

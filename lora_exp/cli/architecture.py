"""`model=hf`: family and sizes of the model are read from the config.json of `model.weights`."""

import copy
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.config.conversion import plain_values
from lora_exp.config.errors import InputError
from lora_exp.models.hf_config import resolve_architecture


def composed_values(composed: DictConfig) -> dict[str, Any]:
  """Returns the composed settings as plain values, with `model.family=hf` replaced by the contents of config.json.

  Values that were given take precedence. For a hub id, config.json is downloaded. Raises InputError if config.json is
  missing or the model is not supported.
  """
  if OmegaConf.select(composed, "model.family") != "hf":
    return plain_values(composed)
  if composed.model.weights is None:
    raise InputError("model.weights=null: model=hf reads the model from its config.json; add model.weights=DIR")
  architecture = resolve_architecture(str(composed.model.weights))
  family = architecture.pop("family")
  composed = copy.deepcopy(composed)
  _fill_nulls(composed.model, architecture)
  values = plain_values(composed)  # interpolations see the sizes; the run keeps the name hf
  values["model"]["family"] = family
  return values


def _fill_nulls(node: DictConfig, values: dict[str, Any]) -> None:
  """Replaces null settings of `node` by their values in `values`."""
  for key, value in values.items():
    if isinstance(value, dict) and isinstance(node.get(key), DictConfig):
      _fill_nulls(node[key], value)
    elif node.get(key) is None:
      node[key] = value

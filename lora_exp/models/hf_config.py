"""Reads Hugging Face's config.json with the tables of the families. Imports no jax.

The layouts of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters) are supported. Missing fields have the
defaults of transformers' class. All unsupported fields are reported at once.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.config.schema import ArchConfig
from lora_exp.models.config_table import OPTIONS, ConfigFile, PublishedConfig, Settings, shortened
from lora_exp.models.family import Family
from lora_exp.models.registry import all_families, get_family
from lora_exp.models.weights.locate import (
  DEQUANTISED,
  find_weights,
  is_path,
  quantised_problem,
  read_config_json,
)
from lora_exp.runtime.foreign_files import damage_reported

ARCH = "arch."
UNSUPPORTED = ("use_bidirectional_attention", "add_cross_attention", "scale_attn_by_inverse_layer_idx")  # if true


def resolve_architecture(weights: str) -> dict[str, Any]:
  """Reads the config.json of `weights` as fields of `ModelConfig`; for a hub id, it is downloaded.

  If a local checkpoint also contains a head that differs from the token embedding, the head is untied, as in
  transformers, even if config.json ties it. Raises InputError as `from_hf` does, and if there is no config.json.
  """
  fields = from_hf(*read_config_json(weights))
  if fields["arch"]["tied"] and is_path(weights):
    from lora_exp.models.weights.unused_tensors import has_another_head  # imports numpy

    fields["arch"]["tied"] = not has_another_head(find_weights(weights), get_family(fields["family"]).names)
  return fields


def from_hf(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
  """Converts config.json to fields of `ModelConfig`: family, sizes and `arch`, as plain values.

  Raises InputError for unsupported architectures, fields and values, and for missing sizes. Each problem starts with
  the file name `where`.
  """
  with damage_reported(where, "the settings of a model"):
    return _checked(config, where)


def _checked(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """`from_hf`, where a value of an unexpected kind may raise any error of Python."""
  try:
    family, published = _family(config)
    return {"family": family.name, **_nested(_read(config, published))}
  except InputError as error:
    raise InputError([f"{where}: {problem}" for problem in error.problems]) from None


def published_families() -> dict[str, tuple[Family, PublishedConfig]]:
  """The families that transformers supports, by class name; a family may have several."""
  by_class = {}
  for family in all_families().values():
    if family.config is not None:
      for architecture in (family.config.architecture, *family.config.wrappers.values()):
        by_class[architecture] = (family, family.config)
  return by_class


def _family(config: Mapping[str, Any]) -> tuple[Family, PublishedConfig]:
  known = published_families()
  name = _architecture(config, known)
  _check_model_type(config, name, known[name][1])
  return known[name]


def _check_model_type(config: Mapping[str, Any], name: str, published: PublishedConfig) -> None:
  """Raises InputError if `model_type` is that of another class than `name`; transformers takes the class from it."""
  by_class = {published.architecture: published.model_type}
  by_class |= {wrapper: model_type for model_type, wrapper in published.wrappers.items()}
  given = config.get("model_type")
  if given is not None and given != by_class[name]:
    raise InputError(f"model_type={shortened(given)} and architectures={name} name different models; the model_type of "
                     f"{name} is {by_class[name]}: correct the one that is wrong, or copy config.json again")


def _architecture(config: Mapping[str, Any], known: Mapping[str, tuple[Family, PublishedConfig]]) -> str:
  """The class named in the file, or the class of its `model_type`. Raises InputError if it is not supported."""
  model_type, named = config.get("model_type"), config.get("architectures")
  by_type: dict[str, str] = {}
  for _, published in known.values():
    by_type |= {published.model_type: published.architecture, **published.wrappers}
  if not named and model_type is None:
    raise InputError("neither architectures nor model_type names the kind of model; copy config.json again")
  if not named:
    if model_type not in by_type:
      raise InputError(f"model_type={shortened(model_type)}: not supported; choose {', '.join(by_type)}")
    return by_type[model_type]
  name = str(named[0] if isinstance(named, list) else named)
  if name not in known:
    of_type = by_type.get(str(model_type))
    hint = f"of model_type={model_type}, only {of_type} is read" if of_type else f"choose {', '.join(known)}"
    raise InputError(f"architectures={shortened(name)}: not supported; {hint}")
  return name


def _read(config: Mapping[str, Any], published: PublishedConfig) -> Settings:
  """Reads all settings, by path."""
  values = config
  if "text_config" in config and published.wrappers:
    text = ConfigFile(config).mapping("text_config")
    _check_model_type(text, published.architecture, published)
    values = {"tie_word_embeddings": config.get("tie_word_embeddings", True), **text}
  file = ConfigFile(values, published.defaults)
  if config.get("quantization_config") is not None or values.get("quantization_config") is not None:
    given = config.get("quantization_config") or values.get("quantization_config")
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method not in DEQUANTISED:
      file.problems.append(f"quantization_config: {quantised_problem(shortened(method or 'an unknown method'))}")
  for name in UNSUPPORTED:
    if values.get(name):
      file.refuse(name, "supported: false")
  for name, supported in published.supported.items():
    if file.get(name) != supported:
      file.refuse(name, f"supported: {str(supported).lower()}")
  settings: Settings = dict(published.fixed)
  for row in published.fields:
    settings[row.ours] = row.read(file, settings)
  for rule in published.rules:
    rule.read(file, settings)
  if file.problems:
    raise InputError(list(dict.fromkeys(file.problems)))
  return settings


def _nested(settings: Settings) -> dict[str, Any]:
  """Converts settings by path to the fields of `ModelConfig`, with a complete `arch`."""
  options = {path.removeprefix(OPTIONS): x for path, x in settings.items() if path.startswith(OPTIONS)}
  arch = {path.removeprefix(ARCH): x for path, x in settings.items() if path.startswith(ARCH) and OPTIONS not in path}
  sizes = {path: x for path, x in settings.items() if not path.startswith(ARCH)}
  return {**sizes, "arch": asdict(ArchConfig(**arch, options=options or None))}

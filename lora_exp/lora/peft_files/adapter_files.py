"""The files of an adapter in PEFT's format: adapter_config.json, adapter_model.safetensors and our lora_exp.json.

lora_exp.json has the values that PEFT does not know. Files are untrusted input: no code in them is executed, and sizes
are checked before arrays are read.
"""

from pathlib import Path
from typing import Any

from lora_exp.config import InputError
from lora_exp.lora.peft_files.adapter_config import PeftConfig
from lora_exp.runtime.json_files import parse_json_object
from lora_exp.runtime.safetensors_reader import TensorEntry, read_header

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
METADATA = "lora_exp.json"  # version 0.1.0 stored these values in the config, under `lora_exp`
LARGEST_CONFIG = 2**24  # bytes
SHOWN = 20  # largest number of problems to list


def read_files(directory: Path) -> tuple[PeftConfig, dict[str, TensorEntry]]:
  """Reads the config, and the header of the weights. Raises InputError if a file is missing or cannot be read."""
  path, weights = directory / CONFIG, directory / WEIGHTS
  if not weights.is_file():
    pickle = (f"; {PICKLE} is a pickle, which is not safe to load: if you trust it, write the tensors of "
              "torch.load(FILE, weights_only=True) with safetensors.torch.save_file")
    raise InputError(f"{directory} contains no adapter: {WEIGHTS} is missing"
                     f"{pickle if (directory / PICKLE).exists() else ''}")
  if not path.is_file():
    raise InputError(f"{directory} contains no adapter: {CONFIG} is missing")
  problems: list[str] = []
  contents: list[Any] = []
  for file, read_file in ((path, _read_config), (weights, read_header)):
    try:
      contents.append(read_file(file))
    except InputError as error:
      problems += error.problems
    except OSError as error:
      problems.append(f"{file} cannot be read: {error.strerror}")
  raise_problems(problems)
  return contents[0], contents[1]


def _read_config(path: Path) -> PeftConfig:
  """adapter_config.json with our metadata. Raises InputError if a file is too large or invalid."""
  values = _read_json(path)
  metadata = path.parent / METADATA
  if "lora_exp" not in values and metadata.is_file():
    values["lora_exp"] = _read_json(metadata)
  return PeftConfig(values, str(path))


def _read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file. Raises InputError if it is too large or invalid."""
  if path.stat().st_size > LARGEST_CONFIG:
    raise InputError(f"{path} has more than {LARGEST_CONFIG:,} bytes: it is not a file of an adapter")
  return parse_json_object(path.read_bytes(), path)


def read_config_json(directory: Path) -> dict[str, Any]:
  """Reads adapter_config.json in `directory`."""
  return _read_json(directory / CONFIG)


def read_metadata(directory: Path) -> dict[str, Any]:
  """Reads the metadata that `save_adapter` wrote; {} for an adapter of another program."""
  if (directory / METADATA).is_file():
    return _read_json(directory / METADATA)
  metadata = _read_json(directory / CONFIG).get("lora_exp", {})
  return metadata if isinstance(metadata, dict) else {}


def raise_problems(problems: list[str]) -> None:
  """Raises InputError with the first problems, if there are any."""
  if len(problems) > SHOWN:
    problems = [*problems[:SHOWN], f"… and {len(problems) - SHOWN:,} more"]
  if problems:
    raise InputError(problems)

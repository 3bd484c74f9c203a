"""inspect.json, which task=inspect writes beside a run: spectra that need the kernels of the base.

They count while the weights beside the file are those that were inspected.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

from lora_exp.report.reading.adapter_updates import ADAPTER
from lora_exp.runtime.spectrum import UpdateSpectrum

INSPECT_FILE = "inspect.json"
FULL_MODEL = Path("model.safetensors")


def read_inspection(directory: Path) -> list[UpdateSpectrum]:
  """The spectra in inspect.json; [] if there is none, or if it is of other weights."""
  try:
    content = json.loads((directory / INSPECT_FILE).read_text(encoding="utf-8"))
    if content["weights"] != weights_digest(directory):
      return []
    names = [field.name for field in fields(UpdateSpectrum)]
    return [UpdateSpectrum(**{name: row[name] for name in names}) for row in content["modules"]]
  except (OSError, ValueError, KeyError, TypeError):
    return []


def weights_digest(directory: Path) -> str | None:
  """SHA-256 of what a run trained: adapter_model.safetensors, or the whole model; None if there is neither."""
  for path in (directory / ADAPTER, directory / FULL_MODEL):
    if path.is_file():
      with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
  return None

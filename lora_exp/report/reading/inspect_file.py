"""inspect.json, which task=inspect writes into a run directory: spectra that need the kernels of the base.

The file is valid only for the weights that were inspected.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np

from lora_exp import __version__
from lora_exp.report.reading.adapter_updates import ADAPTER_FILE
from lora_exp.runtime.files import write_json
from lora_exp.runtime.spectrum import UpdateSpectrum, round_off

INSPECT_FILE = "inspect.json"
FULL_MODEL = Path("model.safetensors")
MEANS = ("rank", "effective_rank", "stable_rank", "directions", "energy_first", "energy_half", "norm", "relative_norm",
         "amplification", "intruders")


def write_inspection(directory: Path, method: str, spectra: Sequence[UpdateSpectrum]) -> None:
  """Writes inspect.json: the spectra of all modules, their means, and the digest of the weights."""
  content = {"version": __version__, "run": str(directory), "method": method, "weights": weights_digest(directory),
             "mean": mean_spectrum(spectra), "modules": [asdict(spectrum) for spectrum in spectra]}
  write_json(directory / INSPECT_FILE, content)


def mean_spectrum(spectra: Sequence[UpdateSpectrum]) -> dict[str, float | None]:
  """The mean of each field in MEANS over modules; None for a field without values."""
  means: dict[str, float | None] = {}
  for name in MEANS:
    values = [getattr(spectrum, name) for spectrum in spectra]
    known = [value for value in values if value is not None]
    means[name] = round_off(float(np.mean(known))) if known else None
  return means


def read_inspection(directory: Path) -> list[UpdateSpectrum]:
  """The spectra in inspect.json; [] if it is missing or was computed from other weights."""
  try:
    content = json.loads((directory / INSPECT_FILE).read_text(encoding="utf-8"))
    if content["weights"] != weights_digest(directory):
      return []
    names = [field.name for field in fields(UpdateSpectrum)]
    return [UpdateSpectrum(**{name: row[name] for name in names}) for row in content["modules"]]
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return []


def weights_digest(directory: Path) -> str | None:
  """SHA-256 of a run's weights file: adapter_model.safetensors or model.safetensors; None if there is neither."""
  for path in (directory / ADAPTER_FILE, directory / FULL_MODEL):
    if path.is_file():
      with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
  return None

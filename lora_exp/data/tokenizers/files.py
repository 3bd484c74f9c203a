"""Which file holds a checkpoint's tokenizer."""

import importlib
from pathlib import Path

from lora_exp.config.errors import InputError
from lora_exp.data.tokenizers.base import Tokenizer
from lora_exp.models.weights.locate import SMOLLM2, find_weights

FROM_WEIGHTS = "from_weights"
READERS = {".json": "hf", ".model": "spm", ".spm": "spm", ".gguf": "gguf"}
WANTED = "tokenizer.json, a sentencepiece *.model, a *.gguf, or GPT-2's vocab.json and merges.txt"


def find(name: str, weights: str | None = None) -> Path | None:
  """The file of the tokenizer that `name` means, or None if it means no path. Raises InputError if none lies there."""
  if name == FROM_WEIGHTS:
    if weights is None:
      raise InputError(f"model.tokenizer={FROM_WEIGHTS}: the weights bring it; set model.weights=PATH too")
    place = find_weights(weights)
    folder = place if place.is_dir() else place.parent
    # The archives of Gemma keep the tokenizer beside the checkpoint's directory.
    candidates = [place] if place.suffix == ".gguf" else [folder, folder.parent / "tokenizer.model"]
  elif name == SMOLLM2 or Path(name).expanduser().exists():
    candidates = [find_weights(name) if name == SMOLLM2 else Path(name).expanduser()]
  else:
    return None
  for candidate in candidates:
    if file := tokenizer_file(candidate):
      return file
  raise InputError(f"{candidates[0]} holds no tokenizer: expected {WANTED}")


def tokenizer_file(place: Path) -> Path | None:
  """`place` if it is a file, else the tokenizer in that directory, or None."""
  if place.is_file():
    return place
  for name in ("tokenizer.json", "tokenizer.model"):
    if (place / name).is_file():
      return place / name
  for pattern in ("*.model", "*.gguf"):
    found = sorted(place.glob(pattern))
    if len(found) > 1:
      raise InputError(f"{place} holds several {pattern} ({', '.join(f.name for f in found[:3])}): name one of them")
    if found:
      return found[0]
  vocab = place / "vocab.json"
  return vocab if vocab.is_file() and (place / "merges.txt").is_file() else None


def read(file: Path) -> Tokenizer:
  """The tokenizer in `file`, by its ending. Raises InputError if it is none, or a package that reads it is absent."""
  if file.suffix not in READERS:
    raise InputError(f"{file} is no tokenizer: expected {WANTED}")
  # Imported when asked for: each needs a library that only its files need.
  return importlib.import_module(f"lora_exp.data.tokenizers.{READERS[file.suffix]}").read(file)

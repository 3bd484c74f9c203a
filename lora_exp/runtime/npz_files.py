"""Reads files of arrays (npz) as untrusted input."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

MOST_BYTES = 2**29  # of all arrays; a zip archive of a megabyte can claim a terabyte
CAUSES = (OSError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError, SyntaxError, TypeError,
          zipfile.BadZipFile, zlib.error)  # fmt: skip


def read_npz(path: Path) -> dict[str, np.ndarray]:
  """The arrays of an npz file by name. Raises ValueError for a damaged one, and for one that is too large."""
  try:
    with zipfile.ZipFile(path) as archive:
      size = sum(entry.file_size for entry in archive.infolist())
    if size > MOST_BYTES:
      raise ValueError(f"{path.name} claims {size:,} bytes of arrays")
    with np.load(path, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except CAUSES as error:
    raise ValueError(f"{path.name} cannot be read ({type(error).__name__})") from error
  if not all(isinstance(x, np.ndarray) for x in arrays.values()):
    raise ValueError(f"{path.name} has entries that are not arrays")
  return arrays

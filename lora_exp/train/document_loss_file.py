"""held_out.npz of a run: the loss of each held-out document at each evaluation.

    steps (E,) int64      step of each evaluation; 0 is the base
    nats (E, D) float32   loss of each document, summed over its targets
    tokens (D,) int64     number of targets of each document
    half (D,) uint8       0: tuning, 1: report (all documents with data.split=none)
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from lora_exp.config.errors import DiskError
from lora_exp.runtime.files import write_atomically
from lora_exp.runtime.run_files import HELD_OUT_FILE
from lora_exp.train.held_out_documents import HeldOutDocuments


class DocumentLossFile:
  """The losses of a run's documents so far; `write` replaces held_out.npz."""

  def __init__(self, path: Path, documents: HeldOutDocuments, steps: list[int], nats: list[np.ndarray]):
    self.path, self.documents, self.steps, self.nats = path, documents, steps, nats

  def add(self, step: int, nats_D: np.ndarray) -> None:
    """Adds the evaluation at `step`; one that is there already is kept."""
    if step not in self.steps:
      self.steps.append(step)
      self.nats.append(nats_D.astype(np.float32))

  def write(self) -> None:
    """Writes held_out.npz atomically. Raises DiskError."""
    try:
      write_atomically(self.path, self._save)
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror}); free disk space and resume") from error

  def _save(self, temporary: Path) -> None:
    tokens_D, half_D = self.documents.tokens, self.documents.half
    nats_ED = np.array(self.nats, np.float32).reshape(len(self.nats), len(half_D))
    with temporary.open("wb") as file:
      np.savez_compressed(file, steps=np.array(self.steps, np.int64), nats=nats_ED, tokens=tokens_D, half=half_D)


def open_document_loss_file(
  run_dir: Path, documents: HeldOutDocuments, last_step: int | None
) -> DocumentLossFile | None:
  """Starts held_out.npz of a run, or with `last_step` continues it without the evaluations of later steps.

  None if a resumed run has no matching file, such as a run of version 0.1.0, which then continues without one.
  """
  path = run_dir / HELD_OUT_FILE
  if last_step is None:
    return DocumentLossFile(path, documents, [], [])
  try:
    with np.load(path, allow_pickle=False) as file:
      steps, nats_ED, tokens_D, half_D = (file[name] for name in ("steps", "nats", "tokens", "half"))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
    return None
  if not (np.array_equal(tokens_D, documents.tokens) and np.array_equal(half_D, documents.half)):
    return None
  kept = [e for e, step in enumerate(steps.tolist()) if step <= last_step]
  return DocumentLossFile(path, documents, [int(steps[e]) for e in kept], [nats_ED[e] for e in kept])

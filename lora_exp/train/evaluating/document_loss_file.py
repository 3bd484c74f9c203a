"""held_out.npz of a run: the losses and scores of each held-out document at each evaluation.

    steps (E,) int64          step of each evaluation; 0 is the base
    nats (E, D) float32       loss of each document, summed over its targets
    tokens (D,) int64         number of targets of each document
    half (D,) uint8           0: tuning, 1: report (all documents with data.split=none)
    sum_NAME (E, D) float32   other sums of `config/metrics.py`, such as `exact`; NaN where they were not computed
    count_NAME (D,) float32   what they are divided by, such as `generated`: the number of generated answers
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lora_exp.config.errors import DiskError
from lora_exp.config.metrics import METRICS
from lora_exp.runtime.files import write_atomically
from lora_exp.runtime.npz_files import read_npz
from lora_exp.runtime.run_files import HELD_OUT_FILE
from lora_exp.train.evaluating.held_out_documents import HeldOutDocuments

Sums = Mapping[str, np.ndarray]  # name of a sum or count -> its value for each document, (D,)
SUM, COUNT = "sum_", "count_"  # prefixes of arrays in the file
MEANS = [metric for name, metric in METRICS.items() if metric.is_mean and name != "loss"]


@dataclass
class DocumentLossFile:
  """The losses and scores of a run's documents so far; `write` replaces held_out.npz."""

  path: Path
  documents: HeldOutDocuments
  steps: list[int] = field(default_factory=list)
  sums: list[dict[str, np.ndarray]] = field(default_factory=list)  # of each evaluation, with the loss as `nats`
  counts: dict[str, np.ndarray] = field(default_factory=dict)

  def add(self, step: int, sums: Sums) -> None:
    """Adds the evaluation at `step`, and keeps what the file already has."""
    if step not in self.steps:
      self.steps.append(step)
      self.sums.append({"nats": sums["loss"].astype(np.float32)})
    row = self.sums[self.steps.index(step)]
    available = {**self.documents.counts, **sums}
    for metric in MEANS:
      total, count = metric.sums
      if metric.applies(available):
        row.setdefault(SUM + total, available[total].astype(np.float32))
        if count != "count":
          self.counts.setdefault(COUNT + count, available[count].astype(np.float32))

  def write(self) -> None:
    """Writes held_out.npz atomically. Raises DiskError."""
    try:
      write_atomically(self.path, self._save, durable=True)
    except OSError as error:
      raise DiskError(f"{self.path}: cannot be written ({error.strerror}); free disk space and resume") from error

  def _save(self, temporary: Path) -> None:
    tokens_D, half_D = self.documents.tokens, self.documents.half
    names = dict.fromkeys(["nats", *(name for row in self.sums for name in row)])
    missing_D = np.full(len(half_D), np.nan, np.float32)
    arrays: dict[str, Any] = {}
    for name in names:
      rows = [row.get(name, missing_D) for row in self.sums]
      arrays[name] = np.array(rows, np.float32).reshape(len(rows), len(half_D))
    arrays |= {"steps": np.array(self.steps, np.int64), "tokens": tokens_D, "half": half_D}
    with temporary.open("wb") as file:
      np.savez_compressed(file, allow_pickle=False, **arrays, **self.counts)


def open_document_loss_file(
  run_dir: Path, documents: HeldOutDocuments, last_step: int | None
) -> DocumentLossFile | None:
  """Starts held_out.npz of a run, or with `last_step` continues it without the evaluations of later steps.

  None if a resumed run has no matching file, such as a run of version 0.1.0, which then continues without one.
  """
  path = run_dir / HELD_OUT_FILE
  if last_step is None:
    return DocumentLossFile(path, documents)
  try:
    arrays = read_npz(path)
    steps, tokens_D, half_D = (arrays.pop(name) for name in ("steps", "tokens", "half"))
  except (ValueError, KeyError):
    return None
  if not (np.array_equal(tokens_D, documents.tokens) and np.array_equal(half_D, documents.half)):
    return None
  counts = {name: arrays.pop(name) for name in list(arrays) if name.startswith(COUNT)}
  if not _have_shapes(steps, arrays, counts, len(half_D)):
    return None
  kept = [e for e, step in enumerate(steps.tolist()) if step <= last_step]
  sums = [{name: x_ED[e] for name, x_ED in arrays.items() if not np.isnan(x_ED[e]).all()} for e in kept]
  return DocumentLossFile(path, documents, [int(steps[e]) for e in kept], sums, counts)


def _have_shapes(
  steps: np.ndarray, sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray], documents: int
) -> bool:
  """Whether the arrays have the shapes and kinds of numbers in the docstring of this file."""
  if steps.ndim != 1 or steps.dtype.kind != "i" or "nats" not in sums:
    return False
  return all(x.shape == (len(steps), documents) and x.dtype.kind == "f" for x in sums.values()) and all(
    x.shape == (documents,) and x.dtype.kind == "f" for x in counts.values()
  )

"""held_out.npz of a run: the loss of each held-out document at each evaluation."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.runtime.run_files import HELD_OUT_FILE

if TYPE_CHECKING:
  import numpy as np

REPORT_HALF = 1  # value of `half` for the documents that the report scores; 0 for those that choose the best step


@dataclass(frozen=True)
class DocumentLosses:
  """Nats of the D held-out documents that score a run, each the sum over its tokens.

  The documents are those of the report half, or all of them if the held-out data is not split.
  """

  base: "np.ndarray"  # (D,) float64, before training
  exported: "np.ndarray"  # (D,) float64, of the exported state
  tokens: "np.ndarray"  # (D,) int64, target tokens


def read_document_losses(run_dir: Path, exported_step: int) -> DocumentLosses | None:
  """The losses of the base and of the state at `exported_step`; None if the run has no held_out.npz.

  None too for a single document, which tells nothing about the spread of documents. Raises ValueError if the file is
  damaged or has no evaluation at that step.
  """
  import numpy as np  # imported here because the check of a command line needs no arrays

  path = run_dir / HELD_OUT_FILE
  if not path.is_file():
    return None
  try:
    with np.load(path, allow_pickle=False) as arrays:
      steps_E, nats_ED, tokens_D, half_D = (arrays[name] for name in ("steps", "nats", "tokens", "half"))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ValueError(f"{HELD_OUT_FILE} cannot be read ({type(error).__name__})") from None
  numeric = all(x.dtype.kind in "iuf" for x in (steps_E, nats_ED, tokens_D, half_D))
  if not numeric or nats_ED.shape != (*steps_E.shape, *tokens_D.shape) or half_D.shape != tokens_D.shape:
    raise ValueError(f"{HELD_OUT_FILE} has arrays that do not match")
  rows = [np.flatnonzero(steps_E == step) for step in (0, exported_step)]
  if not all(len(row) for row in rows):
    raise ValueError(f"{HELD_OUT_FILE} has no evaluation at step 0 or step {exported_step}")
  scored_D = half_D == REPORT_HALF if (half_D == REPORT_HALF).any() else np.ones(half_D.shape, bool)
  base, exported = (nats_ED[row[-1], scored_D].astype(np.float64) for row in rows)
  if not (np.isfinite(base).all() and np.isfinite(exported).all() and tokens_D[scored_D].sum() > 0):
    raise ValueError(f"{HELD_OUT_FILE} holds losses that are not finite, or no tokens")
  return DocumentLosses(base, exported, tokens_D[scored_D].astype(np.int64)) if scored_D.sum() > 1 else None

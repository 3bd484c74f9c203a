"""held_out.npz of a run: the losses and scores of each held-out document at each evaluation."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.config.metrics import METRICS, Metric
from lora_exp.runtime.run_files import HELD_OUT_FILE

if TYPE_CHECKING:
  import numpy as np

REPORT_HALF = 1  # value of `half` for the documents that the report scores; 0 for those that choose the best step


@dataclass(frozen=True)
class DocumentLosses:
  """What a metric adds up over the D held-out documents that score a run; a score is negated, so that less is better.

  The documents are those of the report half, or all of them if the held-out data is not split.
  """

  base: "np.ndarray"  # (D,) float64, before training: nats of the loss, or minus the sum of a score
  exported: "np.ndarray"  # (D,) float64, of the exported state
  tokens: "np.ndarray"  # (D,) int64, what the sums are divided by: target tokens, rows or generated answers


def read_document_losses(run_dir: Path, exported_step: int) -> dict[str, DocumentLosses]:
  """The losses and scores of the base and of the state at `exported_step`, by metric; {} without held_out.npz.

  A metric with the value of a single document is left out, because it says nothing about the spread between documents.
  Raises ValueError if the file is damaged or has no evaluation at that step.
  """
  import numpy as np  # imported here because the check of a command line needs no arrays

  path = run_dir / HELD_OUT_FILE
  if not path.is_file():
    return {}
  from lora_exp.runtime.npz_files import read_npz

  arrays = read_npz(path)
  try:
    steps_E, nats_ED, tokens_D, half_D = (arrays[name] for name in ("steps", "nats", "tokens", "half"))
  except KeyError as error:
    raise ValueError(f"{HELD_OUT_FILE} has no array {error}") from None
  rows_of_all = [x for name, x in arrays.items() if name.startswith("sum_")] + [nats_ED]
  columns = [x for name, x in arrays.items() if name.startswith("count_")] + [tokens_D, half_D]
  numeric = all(x.dtype.kind in "iuf" for x in arrays.values())
  shaped = all(x.shape == (*steps_E.shape, *tokens_D.shape) for x in rows_of_all)
  if not numeric or not shaped or any(x.shape != tokens_D.shape for x in columns):
    raise ValueError(f"{HELD_OUT_FILE} has arrays that do not match")
  rows = [np.flatnonzero(steps_E == step) for step in (0, exported_step)]
  if not all(len(row) for row in rows):
    raise ValueError(f"{HELD_OUT_FILE} has no evaluation at step 0 or step {exported_step}")
  scored_D = half_D == REPORT_HALF if (half_D == REPORT_HALF).any() else np.ones(half_D.shape, bool)
  found = {}
  for metric, sums_ED, count_D in _metric_arrays(arrays):
    chosen_D = scored_D & (count_D > 0 if metric.name != "loss" else True)
    base, exported = (metric.sign * sums_ED[row[-1], chosen_D].astype(np.float64) for row in rows)
    finite = np.isfinite(base).all() and np.isfinite(exported).all() and count_D[chosen_D].sum() > 0
    if metric.name == "loss" and not finite:
      raise ValueError(f"{HELD_OUT_FILE} holds losses that are not finite, or no tokens")
    if finite and chosen_D.sum() > 1:
      found[metric.name] = DocumentLosses(base, exported, count_D[chosen_D].astype(np.int64))
  return found


def _metric_arrays(arrays: Mapping[str, "np.ndarray"]) -> "Iterator[tuple[Metric, np.ndarray, np.ndarray]]":
  """(metric, its sums (E, D), what they are divided by (D,)) of each metric that the file has."""
  for metric in METRICS.values():
    if metric.is_mean:
      total, count = metric.sums
      sums = arrays.get("nats" if metric.name == "loss" else f"sum_{total}")
      counts = arrays.get("tokens" if count == "count" else f"count_{count}")
      if sums is not None and counts is not None:
        yield metric, sums, counts

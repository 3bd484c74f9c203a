"""The updates ΔW of a run's adapter: the thin factors of each module, read from adapter_model.safetensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.run_files import ADAPTER
from lora_exp.runtime.spectrum import Svd, thin_svd

ADAPTER_FILE = Path(ADAPTER) / "adapter_model.safetensors"
PREFIXES = tuple(f"base_model.model.{name}" for name in ("", "model.", "transformer."))  # before our module paths
# Names of A (R, I) and B (O, R) of a module in PEFT's files.
FACTOR_NAMES = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
# If all modules share A and B: their names, and those of the vectors (R) and (O) that scale them in a module.
SHARED_NAMES = ("base_model.vera_A", "base_model.vera_B")
VECTOR_NAMES = ("vera_lambda_d", "vera_lambda_b")

# With many small matrices, a second BLAS thread is slower, on a busy machine by a factor of fifteen.
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


class ModuleUpdate(NamedTuple):
  """The update of one module."""

  rank: int  # as configured; s·(A·B − A₀·B₀) of PiSSA and OLoRA has up to twice as many directions
  svd: Svd

  @property
  def moved(self) -> bool:
    """Whether ΔW is not zero; without a gradient, B stays zero."""
    return bool(self.svd[1].any())


def read_updates(directory: Path, run: RunRecord) -> dict[str, ModuleUpdate]:
  """Reads ΔW of each adapted module of `run` in `directory`, by module path, without DoRA's norm.

  Returns {} if the run has no adapter, or one without thin factors. Raises ValueError if the file is damaged or does
  not match summary.json.
  """
  file, rows = directory / ADAPTER_FILE, run.summary.get("targets")
  if not file.is_file() or not isinstance(rows, list):
    return {}
  try:
    tensors = load_file(file)
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{ADAPTER_FILE} cannot be read ({error})") from None
  factors = {row["path"]: _factors(tensors, row) for row in rows
             if isinstance(row, dict) and isinstance(row.get("path"), str)}
  if not any(factors.values()):
    return {}
  dropped = {path for path, rank in (run.summary.get("kept_ranks") or {}).items() if rank == 0}  # by AdaLoRA
  return {row["path"]: _update(factors[row["path"]], row) for row in rows
          if row["path"] in factors and (factors[row["path"]] or row["path"] not in dropped)}


def _update(factors: tuple[np.ndarray, np.ndarray] | None, row: Mapping[str, Any]) -> ModuleUpdate:
  """The update of the module in `row` of the targets in summary.json. Raises ValueError."""
  if factors is None:
    raise ValueError(f"{ADAPTER_FILE} has no A and B of {row['path']}")
  a, b = (x.astype(np.float64) for x in factors)
  if a.shape[-1] != b.shape[-2] or not (np.isfinite(a).all() and np.isfinite(b).all()):
    raise ValueError(f"{ADAPTER_FILE}: A and B of {row['path']} have other ranks, or are not finite")
  rank, columns = int(row["rank"]), a.shape[-1]
  if rank < columns and columns != 2 * rank:  # 2·rank: PiSSA and OLoRA; fewer: AdaLoRA
    raise ValueError(f"{ADAPTER_FILE} has rank {columns} for {row['path']}, but summary.json has {rank}")
  return ModuleUpdate(min(rank, columns), thin_svd(a, float(row["scale"]) * b))


def _factors(tensors: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
  """A (…, I, R) and B (…, R, O) of a module; None if the file has none."""
  for module in (prefix + row["path"] for prefix in PREFIXES):
    for a_name, b_name in FACTOR_NAMES:
      if f"{module}.{a_name}" in tensors and f"{module}.{b_name}" in tensors:
        return _transposed(tensors[f"{module}.{a_name}"]), _transposed(tensors[f"{module}.{b_name}"])
    if f"{module}.{VECTOR_NAMES[0]}" in tensors:
      d_R, b_O = (tensors[f"{module}.{name}"] for name in VECTOR_NAMES)
      a_IR, b_RO = (_transposed(tensors[name]) for name in SHARED_NAMES)
      return a_IR[: row["fan_in"], : len(d_R)] * d_R, b_RO[: len(d_R), : len(b_O)] * b_O
  return None


def _transposed(x: np.ndarray) -> np.ndarray:
  return np.swapaxes(x, -1, -2)

"""What the trials of a sweep learned, from the files they left: adapter/, or inspect.json where task=inspect was run.

An adapter's singular values and directions follow from A and B alone. What needs the base too (amplification,
intruders, the update of lora=full) is in inspect.json, and counts while the weights beside it are those it speaks of.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file
from threadpoolctl import threadpool_limits

from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.spectrum import Facts, Svd, directions, facts, overlap, random_overlap, thin_svd

FILE = "inspect.json"
ADAPTER, WHOLE = Path("adapter") / "adapter_model.safetensors", Path("model.safetensors")
PREFIXES = tuple(f"base_model.model.{name}" for name in ("", "model.", "transformer."))  # before our module paths
PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
NEED_W = ("relative_norm", "amplification", "intruders")

# Many small matrices: a second thread of BLAS costs more than it gives, and on a busy machine fifteen times as much.
one_thread = threadpool_limits.wrap(limits=1, user_api="blas")


class Overlap(NamedTuple):
  """How much of the directions that hold most of the energy two seeds share: φ, and what chance would give."""

  inputs: float
  inputs_random: float
  outputs: float
  outputs_random: float


class Update(NamedTuple):
  """The update of one module."""

  rank: int  # that it was given; PiSSA's and OLoRA's s·(A·B − A₀·B₀) has up to twice as many directions
  svd: Svd

  @property
  def moved(self) -> bool:
    """Whether it is any: B stays zero where no gradient came."""
    return bool(self.svd[1].any())


def updates(directory: Path, trial: RunRecord) -> dict[str, Update]:
  """The update of each module that the trial in `directory` adapted, without DoRA's norm; {} if it left no adapter.

  Raises ValueError if the file is damaged, or is not what summary.json says.
  """
  file = directory / ADAPTER
  targets = trial.summary.get("targets")
  if not file.is_file() or not isinstance(targets, list):
    return {}
  try:
    tensors = load_file(file)
  except (SafetensorError, OSError) as error:
    raise ValueError(f"{ADAPTER} cannot be read ({error})") from None
  found = {}
  for row in targets:
    if not isinstance(row, dict) or not isinstance(row.get("path"), str):
      continue
    pair = _factors(tensors, row)
    if pair is None and trial.config.get("lora.method") == "adalora":
      continue  # which took every rank from it
    if pair is None:
      raise ValueError(f"{ADAPTER} has no A and B of {row['path']}")
    a, b = (x.astype(np.float64) for x in pair)
    if a.shape[-1] != b.shape[-2] or not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise ValueError(f"{ADAPTER}: A and B of {row['path']} do not fit, or are not finite")
    svd = thin_svd(a, float(row["scale"]) * b)
    found[row["path"]] = Update(min(int(row["rank"]), a.shape[-1]), svd)
  return found


def _factors(tensors: Mapping[str, np.ndarray], row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
  """A (…, I, R) and B (…, R, O) of a module, as PEFT calls them; of VeRA with its vectors in them."""
  path, turned = row["path"], lambda x: np.swapaxes(x, -1, -2)
  for name in (prefix + path for prefix in PREFIXES):
    for a, b in PAIRS:
      if f"{name}.{a}" in tensors and f"{name}.{b}" in tensors:
        return turned(tensors[f"{name}.{a}"]), turned(tensors[f"{name}.{b}"])
    if f"{name}.vera_lambda_d" in tensors:
      d, out = tensors[f"{name}.vera_lambda_d"], tensors[f"{name}.vera_lambda_b"]
      a, b = turned(tensors["base_model.vera_A"]), turned(tensors["base_model.vera_B"])
      return a[: row["fan_in"], : len(d)] * d, b[: len(d), : len(out)] * out
  return None


def learned(directory: Path, found: Mapping[str, Update]) -> list[Facts]:
  """The facts of every module of the trial in `directory`, with what inspect.json adds."""
  told = {f.module: f for f in inspected(directory)}
  if not found:
    return list(told.values())
  extra = lambda path: {name: getattr(told[path], name) for name in NEED_W} if path in told else {}
  return [facts(path, update.rank, update.svd[1], **extra(path)) for path, update in found.items()]


def seeds_overlap(trials: Sequence[Mapping[str, Update]]) -> Overlap | None:
  """The mean over modules and pairs of `trials`; None without a pair that moved the same module."""
  found = [_overlap(one[path].svd, other[path].svd) for one, other in combinations(trials, 2)
           for path in one if path in other and min(one[path].moved, other[path].moved)]
  return Overlap(*(float(x) for x in np.mean(found, 0))) if found else None


def _overlap(one: Svd, other: Svd) -> Overlap:
  """Of one module; of a stack of kernels the mean, each with as many directions as the one that needs the most."""
  i, j = (int(directions(svd[1]).max()) for svd in (one, other))
  values = []
  for a, b in ((one[0], other[0]), tuple(np.swapaxes(svd[2], -1, -2) for svd in (one, other))):
    values += [float(overlap(a[..., :i], b[..., :j])[..., -1, -1].mean()), random_overlap(i, j, a.shape[-2])]
  return Overlap(*values)


def inspected(directory: Path) -> Iterator[Facts]:
  """What inspect.json says; nothing if there is none, or if it is of other weights."""
  try:
    content = json.loads((directory / FILE).read_text(encoding="utf-8"))
    if content["weights"] == digest(directory):
      names = [f.name for f in fields(Facts)]
      yield from [Facts(**{name: row[name] for name in names}) for row in content["modules"]]
  except (OSError, ValueError, KeyError, TypeError):
    return


def digest(directory: Path) -> str | None:
  """SHA-256 of what a run trained: of adapter_model.safetensors, or of lora=full's model.safetensors."""
  for path in (directory / ADAPTER, directory / WHOLE):
    if path.is_file():
      with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
  return None

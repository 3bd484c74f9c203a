"""Adapters on disk in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT stores lora_A as (rank, in) and lora_B as (out, rank). Where PEFT does not know the family the files have the
same format with our metadata and `"peft": false`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lora_exp.config import InputError
from lora_exp.lora.inject import Adapted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def save_adapter(
  directory: Path, table: Sequence[Adapted], weights: Mapping[str, Mapping[str, np.ndarray]], metadata: Mapping
) -> None:
  """Writes the adapter of `table`: `weights[path]` holds lora_a (I, R) and lora_b (R, O).

  `metadata` goes into adapter_config.json under `lora_exp` (PEFT ignores unknown keys).
  """
  tensors = {}
  for row in table:
    ours = weights[row.path]
    tensors[f"{PREFIX}{row.path}.lora_A.weight"] = np.ascontiguousarray(np.asarray(ours["lora_a"]).T)
    tensors[f"{PREFIX}{row.path}.lora_B.weight"] = np.ascontiguousarray(np.asarray(ours["lora_b"]).T)
  rank, alpha = max(row.rank for row in table), max(row.alpha for row in table)
  config = {
    "peft_type": "LORA",
    "peft": False,
    "r": rank,
    "lora_alpha": alpha,
    "target_modules": [row.path for row in table],
    "rank_pattern": {row.path: row.rank for row in table if row.rank != rank},
    "alpha_pattern": {row.path: row.alpha for row in table if row.alpha != alpha},
    "use_rslora": metadata.get("scaling") == "rslora",
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_dropout": metadata.get("dropout", 0.0),
    "lora_exp": dict(metadata),
  }
  directory.mkdir(parents=True, exist_ok=True)
  _replace(directory / WEIGHTS, lambda p: save_file(tensors, p, metadata={"format": "pt"}))
  _replace(directory / CONFIG, lambda p: p.write_text(json.dumps(config, indent=2) + "\n"))


def load_adapter(directory: Path, table: Sequence[Adapted]) -> dict[str, dict[str, np.ndarray]]:
  """Reads the adapter for the modules of `table`; raises InputError that lists every name, shape or value amiss."""
  path = directory / WEIGHTS
  if not path.is_file():
    raise InputError(f"{directory} holds no adapter: {WEIGHTS} is missing")
  try:
    found = load_file(path)
  except SafetensorError as error:
    raise InputError(f"{path} is not a whole safetensors file: {error}") from None
  wanted = {f"{PREFIX}{t.path}.lora_{k}.weight": (t, k) for t in table for k in "AB"}
  problems = [f"{path}: {name} is missing" for name in wanted.keys() - found.keys()]
  problems += [f"{path}: {name} fits no adapted module" for name in found.keys() - wanted.keys()]
  weights: dict[str, dict[str, np.ndarray]] = {t.path: {} for t in table}
  for name in wanted.keys() & found.keys():
    row, kind = wanted[name]
    shape = (row.rank, row.fan_in) if kind == "A" else (row.fan_out, row.rank)
    if found[name].shape != shape:
      problems.append(f"{path}: {name} is {found[name].shape}, expected {shape}")
    elif not np.isfinite(found[name]).all():
      problems.append(f"{path}: {name} holds values that are not finite")
    weights[row.path][f"lora_{kind.lower()}"] = found[name].T
  if problems:
    raise InputError(sorted(problems))
  return weights


def _replace(path: Path, write) -> None:
  """Writes under a temporary name and renames, so that a reader never sees half a file."""
  temporary = path.with_name(path.name + ".tmp")
  write(temporary)
  os.replace(temporary, path)

"""Checks that the files of a run agree with each other, to detect edited files."""

import json
from pathlib import Path
from typing import Any

from lora_exp.report.reading.file_values import finite
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.run_files import ADAPTER

CLOSE = 1e-5  # relative difference of one loss in two files; both are written from one float
ADAPTER_CONFIG = Path(ADAPTER) / "adapter_config.json"
# Settings that give the modules of a run other ranks or alphas than lora.rank and lora.alpha.
OTHER_RANKS = ("lora.rank_pattern", "lora.init_from")
OTHER_ALPHAS = ("lora.alpha_pattern", "lora.rank_pattern", "lora.init_from")


def edited_settings(run: RunRecord, path: Path) -> list[str]:
  """A sentence for each rank or alpha in config.yaml that differs from summary.json or the adapter in `path`."""
  method = run.method
  if not (method.adapts_kernels and method.uses_rank):
    return []
  problems = []
  if not _any_set(run, OTHER_RANKS):
    problems += _differences(run, "lora.rank", _values(run, "rank"), "summary.json")
    if not method.has_constants:  # the file of PiSSA and OLoRA holds two pairs of factors, AdaLoRA's the kept ranks
      problems += _differences(run, "lora.rank", _adapter_rank(path), str(ADAPTER_CONFIG))
  if method.uses_alpha and not _any_set(run, OTHER_ALPHAS):
    problems += _differences(run, "lora.alpha", _values(run, "alpha"), "summary.json")
  return problems


def _differences(run: RunRecord, key: str, trained: set[float], file: str) -> list[str]:
  """A sentence if another file has a value that differs from `key` in config.yaml."""
  value = finite(run.config.get(key))
  if value is None or not trained or trained == {value}:
    return []
  return [f"config.yaml has {key}={value:g}, but {file} has {', '.join(f'{x:g}' for x in sorted(trained))}"]


def _any_set(run: RunRecord, keys: tuple[str, ...]) -> bool:
  return any(run.config.get(key) not in (None, "{}") for key in keys)


def _values(run: RunRecord, name: str) -> set[float]:
  """The values of a column of the targets in summary.json."""
  values = (finite(row.get(name)) for row in run.summary.get("targets") or [])
  return {value for value in values if value is not None}


def _adapter_rank(path: Path) -> set[float]:
  """`r` of the exported adapter; empty for PiSSA and OLoRA, whose files contain both pairs of factors."""
  try:
    content: Any = json.loads((path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return set()
  rank = finite(content.get("r")) if isinstance(content, dict) and content.get("peft_type") == "LORA" else None
  return set() if rank is None else {rank}


def other_losses(run: RunRecord) -> list[str]:
  """A sentence for each held-out loss that differs between metrics.jsonl and summary.json."""
  curve = dict(run.curve("eval"))
  last = max(curve, default=0)
  problems = []
  for name, step in (("base", 0), ("best", run.best_step), ("final", last)):
    logged, stated = curve.get(step), run.number_at("losses", name)
    if logged is None or stated is None or (step == 0 and name != "base"):
      continue
    if abs(logged - stated) > CLOSE * max(abs(logged), abs(stated)):
      problems.append(f"metrics.jsonl has the held-out loss {logged:.6g} at step {step}, but summary.json has "
                      f"losses.{name}={stated:.6g}")
  return problems

"""results.csv: a row for each trial, in an order of columns that a sweep of the same settings always has."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_exp.config.metrics import METRICS
from lora_exp.config.schema import ADAPTERS
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import alpha_of, settings_of
from lora_exp.report.reading.run_record import SEEDS, RunRecord

# Columns that differ between equal sweeps: times, memory, paths (a reason may name one).
MEASURED = ("seconds_compile", "seconds_train", "seconds_total", "peak_memory_bytes", "tokens_per_s", "run")

# Means over a trial's modules (Facts of spectrum.py); the last three only where task=inspect was run.
LEARNED = ("effective_rank", "stable_rank", "directions", "energy_first", "norm", "relative_norm", "amplification",
           "intruders")


def rows(trials: Sequence[RunRecord], found: Sequence[Group]) -> list[dict[str, Any]]:
  """A row for each trial, its columns in order; None where there is no value."""
  columns = found[0].columns if found else []
  place = {id(trial): (setting, n) for n, group in enumerate(found) for setting in group.settings
           for trial in setting.trials}
  names = [name for name in METRICS if name != "loss" and any(_has(trial, name) for trial in trials)]
  table = []
  for trial in trials:
    setting, group = place.get(id(trial), (None, None))
    table.append(_row(trial, columns, setting, group, names))
  return table


def _has(trial: RunRecord, metric: str) -> bool:
  return trial.held_out(metric) is not None or trial.base_metric(metric) is not None


def _row(
  trial: RunRecord, columns: Sequence[str], setting: Setting | None, group: int | None, metrics: Sequence[str]
) -> dict[str, Any]:
  number = lambda *path: trial.number_at(*path)
  config = settings_of(trial)
  adapter = config.get("lora.method") in ADAPTERS
  scales = {row.get("scale") for row in trial.summary.get("targets") or []}
  gain = None if trial.base is None or trial.outcome is None else trial.base - trial.outcome
  return {
    "number": trial.number,
    "name": trial.config.get("name"),
    "setting": setting.label if setting else None,
    "group": group,
    **{key: config.get(key) for key in columns if key not in SEEDS},
    "method": trial.method,
    "rank": config.get("lora.rank") if adapter else None,
    "alpha": alpha_of(trial),
    "scale": scales.pop() if len(scales) == 1 else None,
    "targets": config.get("lora.targets") if adapter else None,
    "lr": config.get("optim.lr"),
    **{f"seed_{key.partition('.')[0]}": trial.config.get(key) for key in SEEDS},
    "trainable": number("parameters", "trainable"),
    "percent": number("parameters", "percent"),
    "loss": trial.outcome,
    **{f"loss_{name}": number("losses", name) for name in ("base", "first", "final", "best")},
    "best_step": number("losses", "best_step"),
    "gain": gain,
    **{name: trial.held_out(name) for name in metrics},
    **{f"{name}_base": trial.base_metric(name) for name in metrics},
    **{name: number("losses", name) for name in ("retain_base", "retain_final", "forgetting")},
    **{name: trial.learned_mean(name) for name in LEARNED},
    "steps": number("steps"),
    "tokens": number("tokens"),
    "status": trial.status,
    "reason": trial.reason,
    **{f"seconds_{name}": number("seconds", name) for name in ("compile", "train", "total")},
    "peak_memory_bytes": number("peak_memory_bytes"),
    "flops_per_token": number("flops_per_token"),
    "tokens_per_s": number("tokens_per_s"),
    "run": trial.path,
  }


def write(path: Path, table: Sequence[dict[str, Any]]) -> None:
  """The rows as CSV: floats in their shortest exact text, nothing for None."""
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)

"""results.csv: a row for each run. Sweeps of the same settings have the same columns in the same order."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_exp.config.metrics import METRICS
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import LearnedUpdates
from lora_exp.report.grouping.setting_keys import RANK, RATE, TARGETS, effective_settings, resolved_alpha
from lora_exp.report.reading.run_record import SEEDS, RunRecord

# Means over a run's modules (fields of UpdateSpectrum); the last three require task=inspect.
SPECTRUM = ("effective_rank", "stable_rank", "directions", "energy_first", "norm", "relative_norm", "amplification",
            "intruders")
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
Row = dict[str, Any]  # column -> value, None where there is none


def results(runs: Sequence[RunRecord], groups: Sequence[Group], updates: Sequence[LearnedUpdates]) -> list[Row]:
  """The rows of all runs; `updates` has the learned updates of each group."""
  varied = groups[0].varied if groups else []
  place: dict[int, Row] = {}  # id of a run -> its columns that depend on its group
  for n, (group, learned) in enumerate(zip(groups, updates, strict=True)):
    for setting in group.settings:
      for run in setting.runs:
        spectrum = {name: learned.mean(run, name) for name in SPECTRUM}
        place[id(run)] = {"setting": setting.label, "group": n} | spectrum
  metrics = [name for name in METRICS if name != "loss" and any(_has(run, name) for run in runs)]
  return [_row(run, varied, metrics, place.get(id(run), {})) for run in runs]


def _has(run: RunRecord, metric: str) -> bool:
  return run.exported(metric) is not None or run.base(metric) is not None


def _row(run: RunRecord, varied: Sequence[str], metrics: Sequence[str], place: Mapping[str, Any]) -> Row:
  settings = effective_settings(run)
  adapts = run.method.adapts_kernels
  base, loss = run.base("loss"), run.exported("loss")
  gain = None if base is None or loss is None else base - loss
  return {
    "number": run.number,
    "name": run.config.get("name"),
    "setting": place.get("setting"),
    "group": place.get("group"),
    "purpose": "tune" if run.tunes else "score",
    **{key: settings.get(key) for key in varied if key not in SEEDS},
    "method": run.method_label,
    "rank": settings.get(RANK) if adapts else None,
    "alpha": resolved_alpha(run),
    "scale": _scale(run),
    "targets": settings.get(TARGETS) if adapts else None,
    "lr": settings.get(RATE),
    **{f"seed_{key.partition('.')[0]}": run.config.get(key) for key in SEEDS},
    "trainable": run.number_at("parameters", "trainable"),
    "percent": run.number_at("parameters", "percent"),
    "loss": loss,
    "loss_base": base,
    "loss_tuning": None if run.scores_share_choice else run.tuning_result("loss"),
    **{f"loss_{name}": run.number_at("losses", name) for name in ("first", "final", "best")},
    "best_step": run.number_at("losses", "best_step"),
    "gain": gain,
    **{name: run.exported(name) for name in metrics},
    **{f"{name}_base": run.base(name) for name in metrics},
    **{name: run.number_at("losses", name) for name in ("retain_base", "retain_final")},
    "forgetting": run.forgetting,
    **{name: place.get(name) for name in SPECTRUM},
    "steps": run.number_at("steps"),
    "tokens": run.number_at("tokens"),
    "status": run.status,
    "reason": run.reason,
    **{f"seconds_{name}": run.number_at("seconds", name) for name in ("compile", "train", "total")},
    "peak_memory_bytes": run.number_at("peak_memory_bytes"),
    "flops_per_token": run.number_at("flops_per_token"),
    "tokens_per_s": run.number_at("tokens_per_s"),
    "run": run.path,
  }


def _scale(run: RunRecord) -> float | None:
  """The scale of the run's adapted modules; None if they differ or there are none."""
  scales = {row.get("scale") for row in run.summary.get("targets") or []}
  return scales.pop() if len(scales) == 1 else None


def write_csv(path: Path, rows: Sequence[Row]) -> None:
  """Writes the rows; floats in their shortest exact form, None as an empty cell.

  Texts come from run directories of others. One that a spreadsheet would run as a formula gets an apostrophe before it.
  """
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: _without_formula(value) for column, value in row.items()} for row in rows)


def _without_formula(value: Any) -> Any:
  """`value`, with an apostrophe before a text that begins as a formula of a spreadsheet does."""
  return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value

"""The results and costs of a run: the content of summary.json, and the table at the end of a run."""

import importlib.metadata
import json
import platform
import resource
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from lora_exp import __version__
from lora_exp.config import DataConfig, InputError
from lora_exp.config.metrics import METRICS
from lora_exp.data.sources import is_numeric
from lora_exp.lora import methods
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import display_path, typed_path
from lora_exp.runtime.files import write_json
from lora_exp.runtime.run_files import SUMMARY
from lora_exp.train.costs.memory import nbytes
from lora_exp.train.costs.trial_cost import TrialCost
from lora_exp.train.plan import Plan
from lora_exp.train.records.training_record import TrainingRecord

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "wandb")


def run_summary(
  status: str, plan: Plan, cost: TrialCost | None, record: TrainingRecord, base_digest: str, seconds: float
) -> dict[str, Any]:
  """The content of summary.json: status, losses, parameters, costs and fingerprints of a run.

  A packed trial has the memory and FLOPs that it would have alone. Its seconds are its share of the pack's: compiling
  counts in full, and a training step is divided by the number of trials.
  """
  final = record.final
  speed = record.tokens / record.train_seconds if record.train_seconds else None
  tokens = plan.cfg.train.batch_size * plan.cfg.data.seq_len
  return {
    "status": status,
    "name": plan.cfg.name,
    "steps": record.steps,
    "tokens": record.tokens,
    "losses": {
      "base": record.base_loss,
      "first": record.first,
      "final": final,
      "best": record.best,
      "best_step": record.best_step,
      "exported_step": record.exported_step,
      "retain_base": record.retain_base,
      "retain_final": record.retain_final,
      "retain_exported": record.retain_exported,
      "forgetting": record.forgetting,
    },
    "perplexity": record.scores.get("final", {}).get("perplexity"),
    "held_out_tokens": record.held_out_tokens,
    "scores": record.scores,
    **({"halves": halves} if (halves := record.half_scores()) else {}),
    "method": methods.of(plan.cfg.lora).facts(),
    "parameters": plan.parameters(),
    "targets": [asdict(row) for row in plan.table],
    "seconds": {
      "compile": round(cost.compile_seconds, 3) if cost else 0.0,
      "train": round(record.train_seconds, 3),
      "total": round(seconds, 3),
    },
    "peak_memory_bytes": cost.peak_memory_bytes if cost else None,
    "process_rss_bytes": process_bytes(),
    "tokens_per_s": speed and round(speed, 1),
    "flops_per_token": round(cost.flops / tokens) if cost else None,
    "base": record.base,
    "fingerprints": {"base": base_digest, "data": record.data},
    "mesh": dict(plan.layout.mesh.shape),
    "device": jax.devices()[0].device_kind,
    "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    "versions": _versions(),
  }


def _versions() -> dict[str, str]:
  """The versions of Python, of this package and of those of `LIBRARIES` that are installed."""
  versions = {"python": platform.python_version(), "lora_exp": __version__}
  for name in LIBRARIES:
    with suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return versions


def process_bytes() -> int:
  """The peak resident memory of this process in bytes. getrusage reports KiB on Linux and bytes on macOS."""
  unit = 1 if platform.system() == "Darwin" else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show_result(summary: dict, run_dir: Path, data: DataConfig, prompt: str) -> None:
  """Shows the results of a run, and a command to use it: task=generate with `prompt` for text, else task=evaluate."""
  counts, seconds = summary["parameters"], summary["seconds"]
  text = not is_numeric(data)
  unit = "tokens" if text else "examples"
  speed, memory = summary["tokens_per_s"], summary["peak_memory_bytes"]
  facts = {
    **_loss_facts(summary, data),
    **_metric_facts(summary["scores"]),
    "trainable parameters": f"{counts['trainable']:,} of {counts['total']:,} ({counts['percent']:.3g} %)",
    "time": f"{seconds['total']:.1f} s: {seconds['compile']:.1f} s compile, {seconds['train']:.1f} s train",
    "speed": f"{speed:,.0f} {unit}/s" if speed else "-",
    "memory": f"{nbytes(memory)} in the step" if memory else "-",
    "run directory": display_path(run_dir),
  }
  console.show_facts("Result", facts)
  run = typed_path("run", run_dir)
  use = f"task=generate {run} 'prompt=\"{prompt}\"'" if text else f"task=evaluate {run}"
  console.show_command("Use it:", f"python -m lora_exp {use}")


def _loss_facts(summary: dict, data: DataConfig) -> dict[str, str]:
  """The lines of the table for the losses: before, during and after training."""
  losses, text = summary["losses"], not is_numeric(data)
  counted, unit = ("nats per token over", "tokens") if text else ("over", "examples")
  label = "held-out loss" if text else "loss"
  if data.teacher:
    label = "held-out KL from the teacher"
  perplexity = f", perplexity {summary['perplexity']:.4g}" if summary["perplexity"] else ""
  return {
    f"{label}, base": f"{_loss_text(losses['base'])} {counted} {summary['held_out_tokens']:,} {unit}",
    "first training loss": _loss_text(losses["first"]),
    f"{label}, final": _loss_text(losses["final"]) + perplexity,
    f"{label}, best": _best_text(losses),
    "forgetting": _forgetting_text(losses, " nats" if text else ""),
  }


def _loss_text(value: float | None) -> str:
  return "-" if value is None else f"{value:.4f}"


def _best_text(losses: dict[str, Any]) -> str:
  """The best loss, its step, and its difference from the base's."""
  if losses["base"] is None or losses["best"] is None:
    return "-"
  gain = losses["base"] - losses["best"]
  side = "below" if gain > 0 else "above"
  return f"{_loss_text(losses['best'])} at step {losses['best_step']}, {abs(gain):.4f} {side} the base"


def _forgetting_text(losses: dict[str, Any], unit: str) -> str:
  """The increase of the loss on `data@retain`."""
  if losses["forgetting"] is None:
    return "-"
  before, after = _loss_text(losses["retain_base"]), _loss_text(losses["retain_exported"])
  return f"{losses['forgetting']:+.4f}{unit} on retain ({before} → {after})"


def _metric_facts(scores: dict[str, dict]) -> dict[str, str]:
  """One line for each metric except loss and perplexity: its value before and after training."""
  before, after = scores.get("base", {}), scores.get("final", {})
  others = [metric for name, metric in METRICS.items() if name not in ("loss", "perplexity")]
  return {
    metric.label: f"{before[metric.name]:.{metric.digits}f} → {after[metric.name]:.{metric.digits}f}"
    for metric in others
    if metric.name in before and metric.name in after
  }


def read_summary(run_dir: Path) -> dict[str, Any]:
  """The content of a run's summary.json; {} if the file does not exist. Raises InputError if it is damaged."""
  file = run_dir / SUMMARY
  if not file.is_file():
    return {}
  try:
    summary = json.loads(file.read_text(encoding="utf-8"))
  except (ValueError, RecursionError) as error:
    raise InputError(f"{file} is damaged ({error}); move it away, and training writes it again") from error
  if not isinstance(summary, dict):
    raise InputError(f"{file} does not contain an object; move it away, and training writes it again")
  return summary


def write_summary(run_dir: Path, summary: dict[str, Any]) -> None:
  """Replaces a run's summary.json."""
  write_json(run_dir / SUMMARY, summary)

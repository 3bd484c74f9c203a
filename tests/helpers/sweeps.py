"""Synthetic sweep directories with known answers."""

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import yaml

from lora_exp.config import Config, to_config

BASE = 3.0  # held-out loss of the untouched base
PER_RANK = 1000  # trainable parameters


def trial(directory: Path, number: int | str, loss: float | None, status: str = "done", base: float | None = BASE,
        trainable: int | None = None, forgetting: float | None = None, change: dict | None = None,
        metrics: bool = True, **settings) -> Path:
  """One run directory. `settings` are dotted keys with __ for the dot; `change` is laid over summary.json."""
  cfg = asdict(Config())
  cfg["model"]["base"] = "random"
  for key, value in settings.items():
    *groups, name = key.split("__")
    node = cfg
    for group in groups:
      node = node[group]
    node[name] = value
  lora = cfg["lora"]
  cfg["name"] = settings.get("name", f"minigpt-{lora['method']}-r{lora['rank']}")
  to_config(copy.deepcopy(cfg))  # a config that the program takes
  usual = {"full": 100_000, "frozen": 0}.get(lora["method"], PER_RANK * lora["rank"])
  count = usual if trainable is None else trainable
  path = directory / str(number)
  path.mkdir(parents=True)
  (path / "config.yaml").write_text(yaml.safe_dump(cfg, allow_unicode=True), encoding="utf-8")
  frozen = lora["method"] == "frozen"
  steps = cfg["train"]["steps"]
  summary = {
    "status": status, "name": cfg["name"], "steps": steps, "tokens": 1024 * steps,
    "losses": {"base": base, "first": base, "final": loss, "best": None if frozen else loss, "best_step": steps // 2,
               "exported_step": steps, "retain_base": 2.0,
               "retain_final": None if forgetting is None else 2 + forgetting, "forgetting": forgetting},
    "parameters": {"total": 100_000, "trainable": count, "percent": count / 1000},
    "targets": [] if count in (0, 100_000) else [{"path": "a", "scale": 2.0}, {"path": "b", "scale": 2.0}],
    "seconds": {"compile": 1.0, "train": 2.0 + 0.001 * count / PER_RANK, "total": 4.0},
    "peak_memory_bytes": 1_000_000 + 4 * count, "tokens_per_s": 1000.0, "flops_per_token": 10_000 + count,
    "base": {"kind": "random", "seed": cfg["model"]["seed"]},
    "fingerprints": {"base": f"base{cfg['model']['seed']}", "data": "rows"},
  } | (change or {})
  (path / "summary.json").write_text(json.dumps(summary))
  if metrics:
    rows = [{"step": 0, "tokens": 0, "split": "eval", "loss": base}]
    low = BASE if loss is None else loss
    for step in range(1, steps + 1):
      rows.append({"step": step, "tokens": 1024 * step, "split": "train", "loss": BASE + (low - BASE) * step / steps})
    rows.append({"step": steps, "tokens": 1024 * steps, "split": "eval", "loss": loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path


def ranks(directory: Path, losses: dict[int, float], seeds: Iterable[int] = (0, 1, 2), noise: float = 0.01,
          first: int = 0, **settings) -> Path:
  """`losses[rank]` for each seed, shifted by seed·noise alike (which pairing takes out) and a little by rank."""
  number = first
  for rank, loss in losses.items():
    for seed in seeds:
      own = 0.0001 * ((rank * 7 + seed * 3) % 5 - 2)
      trial(directory, number, loss + noise * (seed - 1) + own, lora__rank=rank, train__seed=seed, **settings)
      number += 1
  return directory


def references(directory: Path, full: float, first: int, seeds: Iterable[int] = (0, 1, 2)) -> None:
  """The frozen base, and full fine-tuning at each seed."""
  trial(directory, first, BASE, lora__method="frozen")
  for n, seed in enumerate(seeds):
    trial(directory, first + 1 + n, full + 0.01 * (seed - 1), lora__method="full", train__seed=seed)

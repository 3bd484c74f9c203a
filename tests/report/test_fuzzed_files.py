"""task=report ends with 0 or 2, and never a traceback, whatever value stands in a file of the sweep."""

import copy
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from reports import read_results
from safetensors.numpy import save_file

from lora_exp.cli import main as entry
from sweeps import references, trial

MISSING = object()
VALUES = {"null": None, "word": "word", "list": [1, "a"], "mapping": {"a": 1}, "huge": 10**400, "nan": math.nan,
          "infinite": -math.inf, "negative": -3, "zero": 0, "true": True, "missing": MISSING}
SEEDS = (0, 1)
RANKS = (2, 4)
GOOD = len(SEEDS) * len(RANKS) + len(SEEDS) + 1  # trials that no test damages: of two ranks, full and the frozen base


def _summary(rank: int) -> dict[str, Any]:
  scores = {"loss": 2.0, "accuracy": 0.5}
  halves = {"base": {"loss": 3.0, "accuracy": 0.1}, "exported": scores}
  return {
    "status": "done", "steps": 4, "held_out_tokens": 100, "perplexity": 7.0, "device": "cpu", "mesh": {"data": 1},
    "losses": {"base": 3.0, "first": 3.0, "final": 2.0, "best": 2.0, "best_step": 4, "exported_step": 4,
               "retain_base": 2.0, "retain_final": 2.1, "forgetting": 0.1},
    "scores": {"base": halves["base"], "final": scores, "best": scores},
    "halves": {"tuning": halves, "report": halves},
    "method": {"name": "lora", "reference": None, "adapts_kernels": True, "uses_rank": True, "uses_alpha": True,
               "has_constants": False},
    "targets": [{"path": "a", "fan_in": 8, "fan_out": 8, "rank": rank, "alpha": 2.0 * rank, "scale": 2.0}],
    "versions": {"python": "3.12", "lora_exp": "1.0"}, "finished": "2026-01-01T00:00:00Z", "kept_ranks": {"a": rank},
  }


def _run(directory: Path, number: int, seed: int = 0, rank: int = 2) -> Path:
  """A small run with every file that the report reads."""
  path = trial(directory, number, 2.0 + 0.01 * seed, lora__rank=rank, lora__alpha=2.0 * rank, train__seed=seed,
               train__steps=4)
  summary = json.loads((path / "summary.json").read_text()) | _summary(rank)
  (path / "summary.json").write_text(json.dumps(summary))
  rng = np.random.default_rng(number)
  (path / "adapter").mkdir()
  save_file({"base_model.model.a.lora_A.weight": rng.normal(size=(rank, 8)).astype(np.float32),
             "base_model.model.a.lora_B.weight": rng.normal(size=(8, rank)).astype(np.float32)},
            path / "adapter" / "adapter_model.safetensors")
  (path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank}))
  np.savez_compressed(path / "held_out.npz", steps=[0, 4], nats=[[9.0, 6.0, 4.0], [6.0, 4.0, 3.0]], tokens=[3, 2, 1],
                      half=[0, 1, 1])
  return path


@pytest.fixture
def sweep(tmp_path) -> Path:
  """A sound sweep of GOOD trials."""
  for n in range(len(SEEDS) * len(RANKS)):
    _run(tmp_path, n, SEEDS[n % 2], RANKS[n // 2])
  references(tmp_path, 1.9, len(SEEDS) * len(RANKS), SEEDS)
  ledger = [{"event": "study", "objectives": ["loss"], "params": ["lora.rank"]}, {"event": "pack", "trials": [0, 1]},
            {"event": "trial", "study_trial": 0, "runs": [0, 1], "params": {"lora.rank": 2}},
            {"event": "trial", "study_trial": 1, "runs": [2, 3], "params": {"lora.rank": 4}},
            {"event": "told", "study_trial": 0, "state": "complete", "loss": 2.0, "time": "2026-01-01T00:00:00+0000"},
            {"event": "done", "trial": 0, "time": "2026-01-01T00:00:00+0000"}]
  (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger))
  overrides = {"task": ["lora.rank=2,4"], "hydra": ["hydra.mode=MULTIRUN"]}
  (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": overrides}}))
  return tmp_path


def _mutations(content: Any, value: Any) -> Iterator[Any]:
  """Copies of nested mappings and lists, each with one entry at some depth replaced by `value`."""
  entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
  for key, below in entries:
    changed = copy.copy(content)
    if value is MISSING:
      del changed[key]
    else:
      changed[key] = value
    yield changed
    for inner in _mutations(below, value):
      changed = copy.copy(content)
      changed[key] = inner
      yield changed


def _report(sweep: Path) -> dict[int, dict[str, str]]:
  """The rows of results.csv by trial, after a report that ended well."""
  assert entry.run(["task=report", f"run={sweep}"]) == 0
  rows = {int(row["number"]): row for row in read_results(sweep)}
  assert [rows[n]["status"] for n in range(GOOD)] == ["done"] * GOOD
  assert "lora" in (sweep / "report.md").read_text()
  return rows


def _cycled(content: Any) -> Iterator[Any]:
  """`content` with each of its entries replaced in turn, by one value of VALUES after the other."""
  for n in range(sum(1 for _ in _mutations(content, None))):
    yield next(islice(_mutations(content, list(VALUES.values())[n % len(VALUES)]), n, None))


def test_any_value_in_a_summary_leaves_the_report_standing(sweep):
  original = json.loads((sweep / "0" / "summary.json").read_text())
  for n, content in enumerate(_cycled(original), start=GOOD):
    (_run(sweep, n, seed=n) / "summary.json").write_text(json.dumps(content))
  assert len(_report(sweep)) > GOOD + 50


def test_any_value_in_a_config_leaves_the_report_standing(sweep):
  original = yaml.safe_load((sweep / "0" / "config.yaml").read_text())
  for n, content in enumerate(_cycled(original), start=GOOD):
    (_run(sweep, n, seed=n) / "config.yaml").write_text(yaml.dump(content))
  assert len(_report(sweep)) > GOOD + 100


def test_any_value_in_metrics_leaves_the_report_standing(sweep):
  original = [json.loads(line) for line in (sweep / "0" / "metrics.jsonl").read_text().splitlines()]
  for n, rows in enumerate(_cycled(original), start=GOOD):
    path = _run(sweep, n, seed=n)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  assert len(_report(sweep)) > GOOD + 25


def test_any_value_in_a_ledger_leaves_the_report_standing(sweep):
  original = [json.loads(line) for line in (sweep / "sweep.jsonl").read_text().splitlines()]
  rows = [row for rows in _cycled(original) for row in rows]
  (sweep / "sweep.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  _report(sweep)
  assert "sweep.jsonl: line" in (sweep / "report.md").read_text()


@pytest.mark.parametrize("damage", ["empty", "half", "binary", "folder"])
def test_a_damaged_file_of_any_kind_leaves_the_report_standing(sweep, damage):
  names = [path.relative_to(sweep / "0") for path in sorted((sweep / "0").rglob("*")) if path.is_file()]
  for n, name in enumerate(names, start=GOOD):
    _damage(_run(sweep, n, seed=n) / name, damage)
  for name in ("sweep.jsonl", "multirun.yaml"):
    _damage(sweep / name, damage)
  assert len(_report(sweep)) == GOOD + len(names)


def _damage(file: Path, how: str) -> None:
  content = file.read_bytes()
  file.unlink()
  if how == "folder":
    file.mkdir()
  else:
    file.write_bytes({"empty": b"", "half": content[: len(content) // 2], "binary": bytes(range(256))}[how])

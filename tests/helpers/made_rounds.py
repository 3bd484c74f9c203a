"""Sweeps in rounds of made runs, whose losses are known."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

from lora_exp.config.metrics import METRICS
from lora_exp.config.override_grammar import parse
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.round_plan import RoundPlan
from lora_exp.sweep.rounds.round_runner import RoundRunner
from lora_exp.sweep.rounds.round_settings import read_rounds
from sweeps import BASE, trial

TUNE = {"setting": "optim.lr", "factors": [0.5, 1, 2], "seed": 100, "extend": 2, "neighbour": True}
NODE = {"zip": None, "repeat_failed": False, "tune": TUNE, "decide": None, "budget": None,
        "params": {"lora.rank": "1,4", "seed": "0,1,2"},
        "extra": [{"lora": "frozen"}, {"lora": "full", "seed": "0,1,2"}]}  # fmt: skip
STEPS, EARLY = 32, 16  # of a made run, and of its evaluation before the end
Loss = Callable[[str, int, float, int], float | None]  # method, rank, rate, seed -> loss; None if it diverges


def planned(*typed: str, **node) -> RoundPlan:
  overrides = lambda texts: parse(texts, None)[0]
  return read_rounds(NODE | node, overrides(list(typed)), overrides)


class MadeRuns:
  """A launcher whose runs have known losses, and half of their gain at EARLY; launch `kill_before` is killed."""

  def __init__(self, directory: Path, loss: Loss, kill_before: int | None = None, stop_in: int | None = None):
    self.directory, self.loss, self.kill_before, self.stop_in = directory, loss, kill_before, stop_in
    self.launches: list[list[list[str]]] = []
    self.stopped = False

  def __call__(self, jobs: list[list[str]], first: int) -> None:
    if len(self.launches) == self.kill_before:
      raise KeyboardInterrupt
    self.launches.append(jobs)
    for number, job in enumerate(jobs, first):
      if len(self.launches) - 1 == self.stop_in and number > first:  # Ctrl-C after the first of them
        self.stopped = True
        return
      self._train(number, dict(text.split("=") for text in job))

  def _train(self, number: int, values: dict[str, str]) -> None:
    run = self.directory / str(number)
    if run.exists() and json.loads((run / "summary.json").read_text())["status"] != "stopped":
      return
    shutil.rmtree(run, ignore_errors=True)
    method, rank, seed = values.get("lora", "lora"), int(values.get("lora.rank", 8)), int(values.get("seed", 0))
    rate, stop = float(values.get("optim.lr", 0)), int(values.get("train.stop_at", STEPS))
    loss = self.loss(method, rank, rate, seed)
    status = "diverged" if loss is None else "done" if stop == STEPS else "stopped"
    trial(self.directory, number, loss, status, lora__method=method, lora__rank=rank, optim__lr=rate,
          train__seed=seed, data__seed=seed, train__steps=STEPS)  # fmt: skip
    if loss is not None:
      curve = {0: BASE, EARLY: (BASE + loss) / 2, STEPS: loss}
      lines = [json.dumps({"step": step, "tokens": step, "split": "eval", "loss": value})
               for step, value in curve.items() if step <= stop]
      (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def train_made(directory: Path, runs: MadeRuns, plan: RoundPlan | None = None):
  """Trains the sweep; returns how its runs ended."""
  directory.mkdir(exist_ok=True)
  launched = LaunchedRuns(directory, runs, lambda: runs.stopped)
  return RoundRunner(plan or planned(), [0.005, 0.005, 0.005, 0.01], METRICS["loss"], 0.05, launched).train()


def bowl(method: str, rank: int, lr: float, seed: int) -> float | None:
  """Best at 0.005 for rank 1, 0.02 for rank 4, 0.01 for full; rank 1 diverges above 0.005."""
  if method == "frozen":
    return BASE
  best = 0.01 if method == "full" else {1: 0.005, 4: 0.02}[rank]
  return None if rank == 1 and lr > 0.005 else 2.0 + 0.1 * abs(math.log2(lr / best)) + seed / 1e4


def ledger_rows(directory: Path, event: str) -> list[dict]:
  lines = [json.loads(line) for line in (directory / "sweep.jsonl").read_text().splitlines()]
  return [line for line in lines if line["event"] == event]


def overrides_of(directory: Path) -> list[list[list[str]]]:
  """The overrides of the trials of each round in the ledger."""
  return [[job["overrides"] for job in row["jobs"]] for row in ledger_rows(directory, "round")]

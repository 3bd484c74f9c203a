"""Does `sweep=decide` say what the full grid says, and how much of its training does it do?

Losses are simulated: gain of the rank + effect of the seed + noise, in shares of the best gain. Half-way through its
training a trial has three quarters of its gain, which differs a little from rank to rank, and a noise of its own. The
rounds are decided by the program's own code; the full grid gives every rank all seeds and is judged once.

    python tests/bench/decide.py [repetitions]
    python tests/bench/decide.py [repetitions] --grid SWEEP …

With --grid, trials are those of real sweeps: each has every rank with 16 seeds or fewer at one rate, for example

    python -m lora_exp sweep=rank model=minigpt_tiny data=planted hydra.sweeper.tune.setting=null \
      seed=0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15 hydra.sweep.dir=SWEEP

The order of their seeds is drawn for each repetition, which changes what the rounds see, but not what the grid says.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_exp.config.metrics import METRICS
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.verdicts.judgement import INSUFFICIENT, ONE, SUFFICIENT, judge
from lora_exp.sweep.rounds.early_drop import drops, fit_prediction, gain_curve
from lora_exp.sweep.rounds.next_round import RoundMaker
from lora_exp.sweep.rounds.round_plan import ComparedSetting, Decision, RoundPlan, RoundResult, RoundTrial

RANKS = (1, 2, 4, 8, 16, 32, 64)
LOOKS, LEVEL, MARGIN, EARLY = (3, 4, 5, 6, 8, 10, 12, 14, 16), 0.05, 0.05, 0.5
WORLDS = {  # gain of each rank, as a share of the best
  "planted rank 2": (0.62, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
  "planted rank 4": (0.40, 0.71, 1.0, 1.0, 1.0, 1.0, 1.0),
  "planted rank 8": (0.22, 0.42, 0.72, 1.0, 1.0, 0.99, 0.99),
  "planted rank 16": (0.12, 0.24, 0.45, 0.74, 1.0, 1.0, 0.99),
  "rising": (0.76, 0.86, 0.93, 0.97, 0.99, 1.0, 1.0),
  "slow rise": (0.90, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0),
  "all equal": (1.0,) * 7,
}
NOISES = (0.003, 0.01, 0.02, 0.03, 0.1)  # standard deviation of a trial; seeds move all ranks together by twice as much
HALF_WAY = 0.75  # of the gain at EARLY; by rank it differs by UNEVEN
UNEVEN = 0.03


@dataclass(frozen=True)
class Grid:
  """Gains (settings, seeds) of a full grid; settings by trainable parameters."""

  final: np.ndarray
  early: np.ndarray  # at EARLY of the training

  def shuffled(self, rng: np.random.Generator) -> "Grid":
    """The same trials with the seeds in another order."""
    order = rng.permutation(self.final.shape[1])
    return Grid(self.final[:, order], self.early[:, order])


@dataclass(frozen=True)
class Outcome:
  """What the rounds said about a grid, and what they cost."""

  answer: int | None
  steps: float  # share of the grid's
  seeds: int  # at the last look


def draw_grid(truth: np.ndarray, noise: float, rng: np.random.Generator) -> Grid:
  """Trials of settings whose true gains are `truth`."""
  shape = (len(truth), LOOKS[-1])
  final = truth[:, None] + noise * rng.normal(size=shape) + 2 * noise * rng.normal(size=LOOKS[-1])
  share = HALF_WAY + UNEVEN * rng.normal(size=len(truth))
  return Grid(final, share[:, None] * final + 0.5 * noise * rng.normal(size=shape))


def read_grid(directory: Path) -> Grid:
  """The trials of a real sweep of ranks, without its references."""
  metric, early, final = METRICS["loss"], dict[int, list[float]](), dict[int, list[float]]()
  for run in read_sweep(directory):
    rank, result, base = run.config.get("lora.rank"), run.result("loss"), run.base("loss")
    if run.tunes or run.method.is_reference or rank is None or result is None or base is None:
      continue
    curve = gain_curve(run, metric)
    final.setdefault(rank, []).append(base - result)
    early.setdefault(rank, []).append(curve[max(step for step in curve if step <= EARLY * max(curve))])
  best = max(float(np.mean(gains)) for gains in final.values())
  return Grid(*(np.array([table[rank] for rank in sorted(table)]) / best for table in (final, early)))


def decided(grid: Grid) -> Outcome:
  """The rounds on a grid."""
  count, seeds = grid.final.shape
  settings = [ComparedSetting([f"lora.rank={n}"], [[f"seed={k}"] for k in range(seeds)], f"{n}") for n in range(count)]
  looks = [*(n for n in LOOKS if n < seeds), seeds]
  plan = RoundPlan(settings, None, decision=Decision(looks, LEVEL, EARLY))
  maker, trials, results = RoundMaker(plan, [None] * count, MARGIN), list[RoundTrial](), dict[int, RoundResult]()
  steps = 0.0
  while (following := maker.next_round(trials, results)) is not None:
    dropped = [] if maker.looks(trials, results) else _dropped(grid, trials, following.trials)
    for trial in following.trials:
      gain = float(grid.final[trial.setting, trial.seed])
      was_dropped = trial.setting in dropped
      results[trial.number] = RoundResult(gain=None if was_dropped else gain, trainable=trial.setting,
                                          dropped=was_dropped)  # fmt: skip
      steps += EARLY if was_dropped else 1
    trials += following.trials
  look = maker.looks(trials, results)[-1]
  return Outcome(look.answer, steps / grid.final.size, look.seeds)


def _dropped(grid: Grid, finished: list[RoundTrial], trials: list[RoundTrial]) -> list[int]:
  """The settings that are dropped in the middle of a round, by the trials of the rounds before it."""
  pairs = [(float(grid.early[t.setting, t.seed]), float(grid.final[t.setting, t.seed])) for t in finished]
  prediction = fit_prediction(1, 2, pairs) if pairs else None
  early: dict[int, list[float]] = {}
  for trial in trials:
    early.setdefault(trial.setting, []).append(float(grid.early[trial.setting, trial.seed]))
  return [] if prediction is None else list(drops(early, prediction, MARGIN))


def grid_answer(grid: Grid) -> int | None:
  """The smallest sufficient rank if all smaller ones are insufficient, by all seeds at once."""
  judgement = judge({str(n): dict(enumerate(row)) for n, row in enumerate(grid.final)}, MARGIN, LEVEL, claims=ONE)
  states = [judgement.state(str(n)) for n in range(len(grid.final))]
  first = next((n for n, state in enumerate(states) if state != INSUFFICIENT), None)
  return first if first is not None and states[first] == SUFFICIENT else None


def row(name: str, noise: str, grids: Iterator[Grid], truth: np.ndarray | None) -> str:
  """A row of the table. `truth`: the true gains, by which an answer may be wrong; None for real trials."""
  same, decides, steps, wrong, ends = [], [], [], [], Counter[int]()
  least = None if truth is None else int(np.argmax(truth >= (1 - MARGIN) * truth.max()))
  for grid in grids:
    outcome, answer = decided(grid), grid_answer(grid)
    same.append(outcome.answer == answer)
    decides.append(answer is not None)
    steps.append(outcome.steps)
    wrong.append(least is not None and outcome.answer not in (None, least))
    ends[outcome.seeds] += 1
  shares = (f"{np.mean(values):7.1%}" for values in (same, decides, steps, wrong))
  return f"{name:16} {noise:>6} {' '.join(shares)}   {', '.join(f'{n}: {ends[n]}' for n in sorted(ends))}"


def main() -> None:
  """Prints a row for each world and noise, or for each real grid."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("repetitions", type=int, nargs="?", default=100)
  parser.add_argument("--grid", type=Path, nargs="+", default=[], help="directories of real sweeps")
  options = parser.parse_args()
  print(f"{'world':16} {'noise':>6} {'same':>7} {'grid':>7} {'steps':>7} {'wrong':>7}   seeds at the last look")
  rng = np.random.default_rng(0)
  for directory in options.grid:
    grid = read_grid(directory)
    left = grid.final - grid.final.mean(1, keepdims=True) - grid.final.mean(0) + grid.final.mean()
    noise = float(np.sqrt((left**2).sum() / (left.shape[0] - 1) / (left.shape[1] - 1)))
    shuffled = (grid.shuffled(rng) for _ in range(options.repetitions))
    print(row(directory.name[:16], f"{noise:.1%}", shuffled, None), flush=True)
  for world, truth in () if options.grid else WORLDS.items():
    for noise in NOISES:
      gains = np.array(truth)
      print(row(world, f"{noise:.1%}", (draw_grid(gains, noise, rng) for _ in range(options.repetitions)), gains),
            flush=True)  # fmt: skip


if __name__ == "__main__":
  main()

"""Does `sweep=decide` say what the full grid says, and how many of its trials does it train?

Losses are fabricated: gain of the rank + effect of the seed + noise, in shares of the best gain. The rounds are decided
by the program's own code; the full grid gives every rank all seeds and is judged once.

    python tests/bench/decide.py [repetitions]
"""

import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lora_exp.report.verdicts.judgement import INSUFFICIENT, SUFFICIENT, judge
from lora_exp.sweep.next_round import RoundMaker
from lora_exp.sweep.round_plan import ComparedSetting, Decision, RoundPlan, RoundResult, RoundTrial

RANKS = (1, 2, 4, 8, 16, 32, 64)
LOOKS, LEVEL, MARGIN = (3, 5, 7, 10), 0.05, 0.05
WORLDS = {  # gain of each rank, as a share of the best
  "planted rank 2": (0.62, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
  "planted rank 4": (0.40, 0.71, 1.0, 1.0, 1.0, 1.0, 1.0),
  "planted rank 8": (0.22, 0.42, 0.72, 1.0, 1.0, 0.99, 0.99),
  "planted rank 16": (0.12, 0.24, 0.45, 0.74, 1.0, 1.0, 0.99),
  "slow rise": (0.90, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0),
  "all equal": (1.0,) * 7,
}
NOISES = (0.003, 0.01, 0.03, 0.1)  # standard deviation of a trial; seeds move all ranks together by twice as much


def main(repetitions: int = 200) -> None:
  """Prints a row for each world and noise."""
  print(f"{'world':16} {'noise':>6} {'same':>6} {'grid decides':>13} {'trials':>7} {'wrong':>6}   seeds at the end")
  for world, truth in WORLDS.items():
    for noise in NOISES:
      rng = np.random.default_rng([len(world), int(1000 * noise)])
      rows = [_repetition(np.array(truth), noise, rng) for _ in range(repetitions)]
      same, decides, share, wrong = (float(np.mean([row[n] for row in rows])) for n in range(4))
      ends = Counter(row[4] for row in rows)
      print(f"{world:16} {noise:6.1%} {same:6.1%} {decides:13.1%} {share:7.1%} {wrong:6.1%}   "
            f"{', '.join(f'{n}: {ends[n]}' for n in LOOKS)}", flush=True)


def _repetition(truth: np.ndarray, noise: float, rng: np.random.Generator) -> tuple[bool, bool, float, bool, int]:
  """Whether the answers agree, whether the grid has one, share of its trials, whether it is wrong, seeds at the end."""
  gains = truth[:, None] + noise * rng.normal(size=(len(truth), LOOKS[-1])) + 2 * noise * rng.normal(size=LOOKS[-1])
  answer, trials, last = decided(gains)
  grid = grid_answer(gains)
  least = int(np.argmax(truth >= (1 - MARGIN) * truth.max()))  # the smallest rank that is within the margin
  wrong = answer is not None and answer != least
  return answer == grid, grid is not None, trials / gains.size, wrong, last


def decided(gains: np.ndarray) -> tuple[int | None, int, int]:
  """The answer of the rounds on `gains` (settings, seeds), the trials that they trained, and seeds at the last look."""
  settings = [ComparedSetting([f"lora.rank={rank}"], [[f"seed={n}"] for n in range(gains.shape[1])], f"{rank}")
              for rank in RANKS[: len(gains)]]
  plan = RoundPlan(settings, None, decision=Decision(list(LOOKS), LEVEL))
  maker, trials = RoundMaker(plan, [None] * len(settings), MARGIN), list[RoundTrial]()
  results: dict[int, RoundResult] = {}
  while (following := maker.next_round(trials, results)) is not None:
    trials += following.trials
    results |= {t.number: RoundResult(gain=gains[t.setting, t.seed], trainable=RANKS[t.setting])
                for t in following.trials}
  look = maker.looks(trials, results)[-1]
  return look.answer if look.decided else None, len(trials), look.seeds


def grid_answer(gains: np.ndarray) -> int | None:
  """The smallest sufficient rank if all smaller ones are insufficient, by all seeds at once."""
  judgement = judge({str(n): dict(enumerate(row)) for n, row in enumerate(gains)}, MARGIN, LEVEL)
  states = [judgement.state(str(n)) for n in range(len(gains))]
  first = next((n for n, state in enumerate(states) if state != INSUFFICIENT), None)
  return first if first is not None and states[first] == SUFFICIENT else None


def run(argv: Sequence[str]) -> None:
  main(*map(int, argv))


if __name__ == "__main__":
  run(sys.argv[1:])

"""How often the report's verdicts are wrong, and how often they are given at all, on simulated sweeps.

    python tests/bench/verdicts.py                 # the table of rates, and the rates of intervals after tuning
    python tests/bench/verdicts.py --sweeps 200 --files 20
    python tests/bench/verdicts.py --world scatter --sweeps 1000    # the worlds with this word in their name

Each world has a true gain for every setting (the best gains 1). Losses are truth + what a seed adds to every setting
+ noise, whose standard deviation is a share of the gain; half of the variance is shared by the settings of a seed,
unless the world's name says otherwise. A sweep is wrong if it calls a setting sufficient that is more than the margin
short of the best, or insufficient that is not.
With --files the same sweeps are also written as run directories and go through the whole report.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.verdicts.judgement import ANY, IN_ORDER, INSUFFICIENT, MARGIN, SUFFICIENT, Gains, Judgement, judge
from lora_exp.report.verdicts.tuning import make_level

SEEDS = (1, 2, 3, 5, 10)
NOISES = (0.003, 0.01, 0.03, 0.1, 0.3)
BASE = 3.0


@dataclass(frozen=True)
class World:
  """What is true of one kind of sweep."""

  name: str
  truth: tuple[float, ...]  # gain of each setting, by cost
  spread: tuple[float, ...] = ()  # of each setting, times the noise; all 1 if empty
  tails: float = 0.0  # degrees of freedom of Student's t for the noise; 0: normal
  skewed: bool = False  # exponential noise: most seeds are a little better than the mean, some much worse
  shared: float = 0.5  # of the variance of a trial, by all settings of a seed
  further: tuple[int, ...] = ()  # seeds that each setting has more than the others
  missing: float = 0.0  # share of trials that are lost
  diverges: tuple[int, float] = (-1, 0.0)  # a setting, and the share of its seeds that diverge
  rates: tuple[float, ...] = ()  # gain lost at each learning rate, if each setting is tuned
  claims: str = IN_ORDER  # as for ranks; ANY: as for targets and methods

  @property
  def enough(self) -> list[bool]:
    """Whether each setting is at most the margin short of the best."""
    return [gain >= (1 - MARGIN) * max(self.truth) - 1e-12 for gain in self.truth]


DOUBLINGS = tuple(1 - 0.02 * k for k in range(6, -1, -1))
WORLDS = (
  World("all equal", (1, 1, 1, 1, 1)),
  World("all equal, ten settings", (1,) * 10),
  World("all equal, spreads differ 9-fold", (1, 1, 1, 1, 1), (1 / 3, 1, 3, 1, 1 / 3)),
  World("all equal, heavy tails", (1, 1, 1, 1, 1), tails=2.5),
  World("plateau", (0.3, 0.6, 1, 1, 1)),
  World("plateau, seven settings", (0.2, 0.4, 0.7, 1, 1, 1, 1)),
  World("plateau, heavy tails", (0.3, 0.6, 1, 1, 1), tails=2.5),
  World("plateau, 30 % of the variance shared", (0.3, 0.6, 1, 1, 1), shared=0.3),
  World("plateau, none of the variance shared", (0.3, 0.6, 1, 1, 1), shared=0.0),
  World("plateau, skewed noise", (0.3, 0.6, 1, 1, 1), skewed=True),
  World("plateau, incomplete", (0.3, 0.6, 1, 1, 1), missing=0.2),
  World("plateau, three have two seeds more", (0.3, 0.6, 1, 1, 1), further=(0, 0, 2, 2, 2)),
  World("plateau, a seed diverges", (0.3, 0.6, 1, 1, 1), diverges=(2, 0.33)),
  World("every doubling gains 2 %", DOUBLINGS),
  World("every doubling gains 2 %, spreads differ", DOUBLINGS, (2, 1, 2, 1, 0.5, 1, 0.5)),
  World("every doubling gains 2 %, incomplete", DOUBLINGS, missing=0.2),
  World("the largest is best by far", (0.7, 0.8, 0.88, 1)),
  World("one is 6 % short", (0.8, 0.94, 1)),
  World("one is 6 % short, and scatters more", (0.8, 0.94, 1), (1, 2, 1)),
  World("one is 6 % short, and the best scatters 3-fold", (0.8, 0.94, 1), (1, 1, 3)),
  World("one is 6 % short, skewed noise", (0.8, 0.94, 1), skewed=True),
  World("one is 6 % short, and it has two seeds more", (0.8, 0.94, 1), further=(0, 2, 0)),
  World("one of five is 6 % short, it and the best scatter 3-fold", (0.4, 0.6, 0.8, 0.94, 1), (1, 1, 1, 3, 3)),
  World("one of eight is 6 % short, it and the best scatter 3-fold", (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 0.94, 1),
        (1, 1, 1, 1, 1, 1, 3, 3)),
  World("four are 6 % short", (0.94, 0.94, 0.94, 0.94, 1)),
  World("nine are 6 % short", (0.94,) * 9 + (1,)),
  World("four are 5.2 % short", (0.948, 0.948, 0.948, 0.948, 1)),
  World("four are 5.2 % short, settings without an order", (0.948, 0.948, 0.948, 0.948, 1), claims=ANY),
  World("plateau, settings without an order", (0.3, 0.6, 1, 1, 1), claims=ANY),
  World("U-shaped", (0.8, 0.94, 1, 0.93, 0.8)),
  World("U-shaped, none of the variance shared", (0.8, 0.94, 1, 0.93, 0.8), shared=0.0),
  World("U-shaped, incomplete", (0.8, 0.94, 1, 0.93, 0.8), missing=0.2),
  World("U-shaped, heavy tails", (0.8, 0.94, 1, 0.93, 0.8), tails=2.5),
  World("two settings 10 % apart", (0.9, 1)),
  World("a third is just inside the margin, another just outside", (0.7, 0.955, 0.945, 1)),
  World("two cross: 5.5 % short, and it scatters 3-fold, heavy tails", (0.8, 0.945, 1, 0.99), (1, 3, 1, 1), tails=2.5),
  World("every doubling gains 2 %, 40 % of the trials lost", DOUBLINGS, missing=0.4),
  World("six are 5.5 % short, spreads differ, heavy tails", (0.945,) * 6 + (1,), (1, 2, 0.5, 1, 2, 0.5, 1), tails=2.5),
  World("plateau, rates flat around the best", (0.3, 0.6, 1, 1, 1), rates=(0.01, 0, 0.01)),
  World("every doubling gains 2 %, rates tuned", DOUBLINGS, rates=(0.1, 0.02, 0, 0.02, 0.1)),
  World("all equal, rates tuned", (1, 1, 1, 1, 1), rates=(0, 0, 0, 0, 0)),
  World("U-shaped, rates tuned", (0.8, 0.94, 1, 0.93, 0.8), rates=(0.03, 0, 0.03)),
)


def draw_gains(world: World, seeds: int, noise: float, rng: np.random.Generator) -> np.ndarray:
  """Gains (settings, rates, seeds); NaN where a trial diverged, inf where it is missing."""
  settings, rates = len(world.truth), max(len(world.rates), 1)

  further = world.further or (0,) * settings
  most = seeds + max(further)

  def draw(*shape: int) -> np.ndarray:
    if world.skewed:
      return 1 - rng.standard_exponential(shape)
    return rng.standard_t(world.tails, shape) if world.tails else rng.standard_normal(shape)

  spread = np.array(world.spread or (1,) * settings)[:, None, None]
  own = draw(settings, rates, most) * spread * noise * np.sqrt(1 - world.shared)
  common = draw(1, 1, most) * noise * np.sqrt(world.shared)
  gains = np.array(world.truth)[:, None, None] - np.array(world.rates or (0,))[None, :, None] + own + common
  gains[rng.random(gains.shape) < world.missing] = np.inf
  for i, more in enumerate(further):
    gains[i, :, seeds + more :] = np.inf
  setting, share = world.diverges
  if setting >= 0:
    gains[setting][rng.random((rates, most)) < share] = np.nan
  return gains


def trial_record(gain: float, rate: int, seed: int) -> RunRecord:
  """A run with this gain over the base."""
  status = "diverged" if np.isnan(gain) else "done"
  losses = {"base": BASE, "best": None if np.isnan(gain) else BASE - gain}
  return RunRecord(seed, str(seed), status, config={"train.seed": seed, "optim.lr": rate}, summary={"losses": losses})


def make_settings(gains: np.ndarray, label: str) -> list[Setting]:
  """A setting for each rate of gains (rates, seeds)."""
  settings = []
  for rate, by_seed in enumerate(gains):
    runs = [trial_record(gain, rate, seed) for seed, gain in enumerate(by_seed) if not np.isinf(gain)]
    if runs:
      settings.append(Setting(label, {"optim.lr": rate}, runs, METRICS["loss"]))
  return settings


def judge_world(world: World, gains: np.ndarray) -> Judgement:
  """The verdicts of the report on one sweep."""
  if not world.rates:
    by_setting: Gains = {str(i): {k: g for k, g in enumerate(by_rate[0]) if not np.isinf(g)}
                         for i, by_rate in enumerate(gains)}
    return judge(by_setting, claims=world.claims)
  levels = [make_level(i, make_settings(by_rate, str(i))) for i, by_rate in enumerate(gains)]
  added = np.diag([level.choice_variance for level in levels])
  return judge({str(level.value): level.gains for level in levels}, added=added, claims=world.claims)


def is_wrong(world: World, judged: Judgement) -> bool:
  """Whether a conclusion is false."""
  states = [judged.state(str(i)) for i in range(len(world.truth))]
  return any((state == SUFFICIENT and not enough) or (state == INSUFFICIENT and enough)
             for state, enough in zip(states, world.enough, strict=True))


def is_right_named(world: World, judged: Judgement) -> bool:
  """Whether the smallest setting called sufficient is the smallest that is."""
  sufficient = judged.names(SUFFICIENT)
  return bool(sufficient) and int(sufficient[0]) == world.enough.index(True)


def rates_of(world: World, seeds: int, noise: float, sweeps: int) -> tuple[float, float]:
  """(share of sweeps with a false conclusion, share that names the right setting)."""
  rng = np.random.default_rng([seeds, int(noise * 1e4), sum(map(ord, world.name))])
  judged = [judge_world(world, draw_gains(world, seeds, noise, rng)) for _ in range(sweeps)]
  return (float(np.mean([is_wrong(world, j) for j in judged])),
          float(np.mean([is_right_named(world, j) for j in judged])))


FLAT = {
  "two, a noise apart": (0.0, 1.0), "three, a noise apart": (1.0, 0.0, 1.0), "three, two noises apart": (2.0, 0.0, 2.0),
  "three equal": (0.0,) * 3, "five equal": (0.0,) * 5, "nine equal": (0.0,) * 9,
  "five in a V": (3.0, 1.5, 0.0, 1.5, 3.0), "six on a parabola": (9.0, 4.0, 1.0, 0.0, 1.0, 4.0),
}  # fmt: skip


def coverage(rates: Sequence[float], seeds: int, sweeps: int, noise: float = 0.03) -> float:
  """How often the interval of a tuned setting's gain holds the true gain at its chosen rate.

  `rates`: what each rate loses, in units of the noise.
  """
  rng = np.random.default_rng([seeds, len(rates)])
  held = []
  for _ in range(sweeps):
    gains = 1 - noise * np.array(rates)[:, None] + noise * rng.standard_normal((len(rates), seeds))
    level = make_level(0, make_settings(gains, "a"))
    true = 1 - noise * rates[level.chosen.values["optim.lr"]]
    gain = level.gain
    held.append(gain.half is not None and gain.low <= true <= gain.high)
  return float(np.mean(held))


def files_are_wrong(world: World, gains: np.ndarray, directory: Path) -> bool:
  """The same through run directories and the finding on ranks: whether what it says is false."""
  from sweeps import trial

  number = 0
  for i, by_rate in enumerate(gains):
    for rate, by_seed in enumerate(by_rate):
      for seed, gain in enumerate(by_seed):
        if np.isinf(gain):
          continue
        loss, status = (None, "diverged") if np.isnan(gain) else (BASE - float(gain), "done")
        lr = 0.005 * 2.0 ** (rate - len(by_rate) // 2)
        trial(directory, number, loss, status, metrics=False, lora__rank=2**i, optim__lr=lr, train__seed=seed)
        number += 1
  [group] = make_groups(read_sweep(directory))
  values = [finding.values for finding in all_findings(group) if finding.topic == "Rank"]
  enough = {2**i: fine for i, fine in enumerate(world.enough)}
  wrong = [rank for value in values for rank in value["sufficient"] if not enough[rank]]
  wrong += [rank for value in values for rank in value["insufficient"] if enough[rank]]
  wrong += [value["rank"] for value in values if value["rank"] and not enough[value["rank"]]]
  return bool(wrong)


def rows(sweeps: int, worlds: Sequence[World] = WORLDS) -> Iterator[str]:
  """The table as Markdown: for each world the worst rate of false conclusions over the noises, by seeds."""
  seeds = " | ".join(f"{n} seed{'s' * (n > 1)}" for n in SEEDS)
  yield f"| world | {seeds} | right at 3 % noise, 3 / 5 / 10 seeds |"
  yield "| --- |" + " ---: |" * (len(SEEDS) + 1)
  for world in worlds:
    found = {(n, noise): rates_of(world, n, noise, sweeps) for n in SEEDS for noise in NOISES}
    worst = [max(found[n, noise][0] for noise in NOISES) for n in SEEDS]
    right = " / ".join(f"{found[n, 0.03][1] * 100:.0f}" for n in (3, 5, 10))
    yield f"| {world.name} | " + " | ".join(f"{rate * 100:.1f}" for rate in worst) + f" | {right} |"


def main() -> None:
  """Prints the tables."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  parser.add_argument("--sweeps", type=int, default=200, help="of each cell of the table")
  parser.add_argument("--world", action="append", help="words in the name of a world of the table")
  parser.add_argument("--files", type=int, default=0, help="sweeps of each world that are written as run directories")
  options = parser.parse_args()
  worlds = [world for world in WORLDS if not options.world or any(words in world.name for words in options.world)]
  print("False conclusions in 100 sweeps, the worst of noises 0.3 to 30 % of the gain:\n")
  for row in rows(options.sweeps, worlds):
    print(row, flush=True)
  if options.world:
    return
  print("\n95 % intervals of a tuned gain that hold, in 100:\n")
  for name, rates in FLAT.items():
    held = ", ".join(f"{n} seeds {coverage(rates, n, options.sweeps) * 100:.1f}" for n in SEEDS if n > 2)
    print(f"- {name}: {held}", flush=True)
  for world in WORLDS[: options.files and None or 0]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as directory:
      wrong = sum(files_are_wrong(world, draw_gains(world, 3, 0.1, rng), Path(directory) / str(i))
                  for i in range(options.files))
    print(f"- {world.name}, through files: {wrong} of {options.files} wrong", flush=True)


if __name__ == "__main__":
  main()

"""Which alpha lets one learning rate serve all ranks: the measurement behind the default of `lora.alpha`.

    python tests/bench/alpha.py minigpt --out DIR     # or minigpt_tiny, smollm2_135m; repeats nothing that DIR holds
    python tests/bench/alpha.py minigpt --out DIR --table     # only prints the table

Trains every rank at five learning rates (0.25 to 4 times the default) under each rule for alpha, in packs. A rule's
regret at a rate is the share of the gain that the worst rank loses against the best that this rank reached under any
rule at any rate. A diverged trial has no gain: its regret is 100 %.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RATES = (0.25, 0.5, 1.0, 2.0, 4.0)  # lora.lr_scale
SHARED = ["logger=none", "sample=none", "data@retain=none", "train.eval_every=0", "train.save_every=0"]
# The last six blocks and 64 tokens per step, so that 25 trials of SmolLM2 take minutes on two cores.
SMALL_LM = ["lora.layers=[24,25,26,27,28,29]", "data.seq_len=64", "train.batch_size=1", "train.steps=16",
            "optim.warmup=4", "train.eval_tokens=512"]  # fmt: skip
# Twice as wide as the default model, and pretrained with AdamW.
WIDE = ["model.width=256", "model.heads=8", "model.ff=256", "model.pretrain.optimizer=adamw",
        "model.pretrain.steps=800", "model.pretrain.batch_size=8",
        "model.pretrain.lr=1.5e-3", "model.pretrain.warmup=40"]  # fmt: skip
MODELS: dict[str, tuple[tuple[int, ...], list[str]]] = {  # the ranks, and settings for a measurement on two cores
  "minigpt": ((1, 2, 8, 32, 128), [*WIDE, "train.eval_tokens=8192"]),
  "minigpt_tiny": ((1, 2, 8, 32, 128), ["model.base=pretrain", "model.pretrain.steps=800"]),
  "smollm2_135m": ((1, 8, 128), SMALL_LM),
}


def twice_the_rank(rank: int) -> float:
  return 2.0 * rank


def root_of_the_rank(rank: int) -> float:
  """Proportional to sqrt(rank), and 16 at rank 8."""
  return round(16 * math.sqrt(rank / 8), 4)


def constant(alpha: float) -> Callable[[int], float]:
  """The rule that gives every rank the same alpha."""

  def rule(rank: int) -> float:
    return alpha

  return rule


RULES: dict[str, Callable[[int], float]] = {
  "2·rank": twice_the_rank,
  "16·√(rank/8)": root_of_the_rank,
  "8": constant(8.0),
  "16": constant(16.0),
  "32": constant(32.0),
}


class Trial(NamedTuple):
  """One point of the grid; `rate` is a multiple of the default rate."""

  rank: int
  alpha: float
  rate: float
  seed: int


def train(model: str, ranks: Sequence[int], seed: int, rules: Sequence[str], out: Path) -> None:
  """Trains the trials of one seed as packs. Finished trials in `out` are skipped."""
  settings = sorted({(rank, RULES[rule](rank)) for rank in ranks for rule in rules})
  each_rank, each_alpha = (",".join(str(value) for value in values) for values in zip(*settings, strict=True))
  pairs = f'hydra.sweeper.zip=[{{lora.rank: "{each_rank}", lora.alpha: "{each_alpha}"}}]'
  varied = [pairs, f"lora.lr_scale={','.join(map(str, RATES))}", f"seed={seed}"]
  command = [sys.executable, "-m", "lora_exp", "-m", "hydra/launcher=packed", f"model={model}", *varied,
             *MODELS[model][1], *SHARED, f"hydra.sweep.dir={out / f'seed{seed}'}"]  # fmt: skip
  if subprocess.run(command, cwd=ROOT).returncode not in (0, 1):  # 1: a trial diverged
    sys.exit(f"{' '.join(command)} failed")


def gains(out: Path) -> dict[Trial, float]:
  """The gain (nats per token of all held-out documents) of every trial in `out`; NaN where it diverged."""
  import yaml

  found = {}
  for path in sorted(out.glob("*/*/config.yaml")):
    config = yaml.safe_load(path.read_text())
    lora = config["lora"]
    summary_path = path.with_name("summary.json")
    summary = json.loads(summary_path.read_text()) if summary_path.exists() else {}
    if summary.get("status") not in ("done", "diverged", "failed"):
      continue
    losses = summary.get("losses") or {}
    done = summary["status"] == "done"
    trial = Trial(lora["rank"], float(lora["alpha"]), float(lora["lr_scale"]), config["train"]["seed"])
    found[trial] = losses["base"] - losses["final"] if done else math.nan
  return found


def mean_gain(found: dict[Trial, float], rank: int, alpha: float, rate: float) -> float | None:
  """The mean over seeds; None if there is no such trial."""
  values = [gain for trial, gain in found.items() if trial[:3] == (rank, alpha, rate)]
  return sum(values) / len(values) if values else None


def table(found: dict[Trial, float]) -> list[str]:
  """The measurement as lines of a Markdown table: a row for each rule."""
  ranks = sorted({trial.rank for trial in found})
  best = {rank: max(gain for trial, gain in by_setting(found).items() if trial[0] == rank and not math.isnan(gain))
          for rank in ranks}  # fmt: skip
  head = ["alpha", *(f"rank {rank}" for rank in ranks), "regret at the default rate", "regret at the best rate"]
  lines = [f"| {' | '.join(head)} |", "| --- |" + " --- |" * (len(ranks) + 2)]
  for name, rule in RULES.items():
    cells, regrets = [], dict.fromkeys(RATES, 0.0)
    for rank in ranks:
      curve = {rate: mean_gain(found, rank, rule(rank), rate) for rate in RATES}
      known = {rate: gain for rate, gain in curve.items() if gain is not None and not math.isnan(gain)}
      if len([gain for gain in curve.values() if gain is not None]) < len(RATES):
        break
      top = max(known, key=known.__getitem__)
      at_default = known.get(1.0, math.nan)
      cells.append(f"{at_default:.3f} ({known[top]:.3f} at {top:g})")
      for rate in RATES:
        regrets[rate] = max(regrets[rate], 1 - known[rate] / best[rank] if rate in known else 1.0)
    if len(cells) == len(ranks):
      shared = min(regrets, key=regrets.__getitem__)
      cells += [f"{regrets[1.0]:.1%}", f"{regrets[shared]:.1%} at {shared:g}"]
      lines.append(f"| {name} | " + " | ".join(cells) + " |")
  return lines


def by_setting(found: dict[Trial, float]) -> dict[tuple[int, float, float], float]:
  """The mean gain over seeds of each (rank, alpha, rate)."""
  keys = {trial[:3] for trial in found}
  return {key: gain for key in keys if (gain := mean_gain(found, *key)) is not None}


def main() -> None:
  """Trains what is missing and prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("model", choices=MODELS)
  parser.add_argument("--out", type=Path, required=True, help="directory of the sweeps; finished trials are kept")
  parser.add_argument("--ranks", type=int, nargs="+", help="some of the model's ranks")
  parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
  parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
  parser.add_argument("--table", action="store_true", help="train nothing")
  args = parser.parse_args()
  if not args.table:
    for seed in args.seeds:
      train(args.model, args.ranks or MODELS[args.model][0], seed, args.rules, args.out.resolve())
  print("\n".join(table(gains(args.out))))


if __name__ == "__main__":
  main()

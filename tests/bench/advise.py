"""How good the advice of task=advise is: against the best of a grid, and against the defaults.

    python tests/bench/advise.py                    # about 12 minutes of CPU time on one core
    python tests/bench/advise.py a4 docs            # some worlds
    python tests/bench/advise.py --grids DIR        # keeps the grids in DIR and reads those that are there

Each world trains the tiny model with every rate, targets and rank of a grid (80 settings, 128 steps, one seed), and
asks task=advise for its advice. In planted worlds a teacher of known rank and targets is learned; in `docs` a
pretrained base learns docstrings. Regret is the share of the best setting's gain that a setting lacks; an advised rate
or rank counts as the nearest one of the grid. Exit code 1 if the advice has a larger mean regret than the defaults.
"""

import argparse
import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lora_exp
from lora_exp.config import Config
from lora_exp.data.rows import make_rows
from lora_exp.train.base import make_base
from lora_exp.train.plan import make_plan
from lora_exp.train.probing.advice import Advice, advise, width_rule
from lora_exp.train.probing.probe import measure
from lora_exp.train.probing.short_runs import ShortRunner

RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)
TARGETS = ("qv", "attention", "mlp", "all_linear")
RANKS = (1, 2, 4, 8)
STEPS, EVAL_TOKENS = 128, 8192
ENOUGH = 0.95  # of the best gain
COMMON = ["model=minigpt_tiny", "data@retain=none", "sample=none", "logger=none", "lora.alpha=16", "data.seq_len=32",
          f"train.steps={STEPS}"]  # fmt: skip


def planted(targets: str, rank: int, seed: int, strength: float = 0.3) -> list[str]:
  teacher = {"targets": targets, "rank": rank, "seed": seed, "strength": strength}
  return ["data=planted", *(f"data.teacher.{key}={value}" for key, value in teacher.items())]


WORLDS = {
  "a1": planted("attention", 1, 1),
  "a4": planted("attention", 4, 0),
  "a8": planted("attention", 8, 5, 0.6),
  "q2": planted("qv", 2, 3),
  "m2": planted("mlp", 2, 6, 0.15),
  "m4": planted("mlp", 4, 2),
  "l2": planted("all_linear", 2, 4),
  "docs": ["data=stdlib_docs", "model.base=pretrain", "model.pretrain.steps=800"],
}


def grid_gains(cfg: Config, kept: Path | None) -> np.ndarray:
  """The gain of every setting (rates, targets, ranks); -inf where it diverged."""
  shape = (len(RATES), len(TARGETS), len(RANKS))
  if kept is not None and kept.exists():
    with np.load(kept) as file:
      return np.nan_to_num(file["gains"].reshape(shape), nan=-np.inf)
  plans = []
  for rate, targets, rank in itertools.product(RATES, TARGETS, RANKS):
    lora, optim = replace(cfg.lora, targets=targets, rank=rank), replace(cfg.optim, lr=rate)
    plans.append(make_plan(replace(cfg, lora=lora, optim=optim)))
  rows, (base, _) = make_rows(cfg.data, plans[0].tokenizer, cfg.cache), make_base(plans[0])
  runs = ShortRunner(plans[0], base, rows, STEPS, EVAL_TOKENS).train(plans, "grid")
  gains = np.array([run.gain for run in runs]).reshape(shape)
  if kept is not None:
    np.savez(kept, gains=gains)
  return gains


@dataclass(frozen=True)
class Score:
  """One world's advice beside its grid."""

  regret: float
  default_regret: float
  rule_regret: float  # of the defaults at the rate of the published rule
  parameters: float  # trained by the advised setting, as a share of the default's
  rate_right: bool
  targets_right: bool
  rank_right: bool


def score(gains: np.ndarray, advice: Advice, cfg: Config) -> Score:
  """Compares the advice with the grid's `gains` (rates, targets, ranks)."""
  rate, targets, rank = nearest(RATES, advice.lr), TARGETS.index(advice.targets), nearest(RANKS, advice.rank)
  default = nearest(RATES, cfg.optim.lr), TARGETS.index(cfg.lora.targets), nearest(RANKS, cfg.lora.rank)
  rule = nearest(RATES, width_rule(cfg.model.family, cfg.model.width))
  best = gains.max()
  by_rank = gains[:, targets].max(0)  # the best rate for each rank
  smallest = int(np.argmax(by_rank >= ENOUGH * by_rank.max()))
  plans = [make_plan(replace(cfg, lora=replace(cfg.lora, targets=t, rank=r)))
           for t, r in ((advice.targets, advice.rank), (cfg.lora.targets, cfg.lora.rank))]  # fmt: skip
  advised_count, default_count = (plan.parameters()["trainable"] for plan in plans)
  return Score(
    regret=1 - gains[rate, targets, rank] / best,
    default_regret=1 - gains[default] / best,
    rule_regret=1 - gains[rule, default[1], default[2]] / best,
    parameters=advised_count / default_count,
    rate_right=abs(rate - int(np.argmax(gains[:, targets, rank]))) <= 1,
    targets_right=gains[:, targets].max() >= ENOUGH * best,
    rank_right=abs(math.log2(advice.rank / RANKS[smallest])) <= 1,
  )


def nearest(values: tuple[float, ...], value: float) -> int:
  """The index of the value with the smallest ratio to `value`."""
  return int(np.argmin(np.abs(np.log(np.array(values) / value))))


def show(name: str, gains: np.ndarray, advice: Advice, result: Score) -> None:
  rate, targets, rank = np.unravel_index(int(np.argmax(gains)), gains.shape)
  best = f"{RATES[rate]:g} {TARGETS[targets]} r{RANKS[rank]}"
  advised = f"{advice.lr:g} {advice.targets} r{advice.rank}"
  regrets = " ".join(f"{100 * x:6.1f} %" for x in (result.regret, result.default_regret, result.rule_regret))
  marks = " ".join("yes" if x else "no " for x in (result.rate_right, result.targets_right, result.rank_right))
  print(f"{name:6} {best:22} {advised:22} {regrets}  {100 * result.parameters:5.0f} %   {marks}", flush=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("worlds", nargs="*", default=list(WORLDS), help=", ".join(WORLDS))
  parser.add_argument("--grids", type=Path, help="directory of the grids that are kept")
  args = parser.parse_args()
  if args.grids is not None:
    args.grids.mkdir(parents=True, exist_ok=True)
  scores = []
  lines = []
  for name in args.worlds:
    cfg = lora_exp.compose([*COMMON, *WORLDS[name]])
    gains = grid_gains(cfg, args.grids and args.grids / f"{name}.npz")
    advice = advise(measure(cfg))
    scores.append(score(gains, advice, cfg))
    lines.append((name, gains, advice, scores[-1]))
  print("\nregret of the advice, of the defaults, and of the defaults at the published rate;")
  print("parameters of the advice as a share of the default's; right: rate, targets, rank")
  print(f"{'world':6} {'best of the grid':22} {'advised':22}   regret  default     rule  params  right")
  for line in lines:
    show(*line)
  means = [float(np.mean([getattr(s, key) for s in scores])) for key in ("regret", "default_regret", "rule_regret")]
  right = [sum(getattr(s, key) for s in scores) for key in ("rate_right", "targets_right", "rank_right")]
  print(f"mean regret: advised {means[0]:.1%}, default {means[1]:.1%}, default at the published rule {means[2]:.1%}; "
        f"right of {len(scores)}: rate {right[0]}, targets {right[1]}, rank {right[2]}")  # fmt: skip
  return int(means[0] > means[1])


if __name__ == "__main__":
  sys.exit(main())

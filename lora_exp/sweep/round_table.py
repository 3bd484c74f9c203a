"""The output of a sweep in rounds: the trials of each round and the reason, the results of tuning, and the costs."""

import math
from collections.abc import Mapping, Sequence

from lora_exp.config.metrics import Metric
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime import console
from lora_exp.sweep.next_round import Results, tuning_penalties
from lora_exp.sweep.round_plan import TUNE, Round, RoundPlan, RoundTrial
from lora_exp.sweep.tuning_rounds import best_factor


def show_round(number: int, current: Round) -> None:
  """Shows the trials of a round and the reason for it."""
  count = len(current.trials)
  console.show(f"\nround {number}: {current.why} ({count} trial{'' if count == 1 else 's'})")


def show_tuning(plan: RoundPlan, trials: Sequence[RoundTrial], results: Results, metric: Metric) -> None:
  """A table of the tuned settings: the metric at each factor, and the best factor."""
  assert plan.tuning is not None
  penalties = tuning_penalties(plan, trials, results)
  factors = sorted({factor for by_factor in penalties.values() for factor in by_factor})
  rows = []
  for n, by_factor in penalties.items():
    cells = [_cell(by_factor.get(factor), metric) for factor in factors]
    rows.append([plan.settings[n].label, *cells, f"{best_factor(by_factor):g}"])
  columns = ["setting", *(f"x {factor:g}" for factor in factors), "best"]
  title = f"Held-out {metric.label} by factor of the default {plan.tuning.setting}, seed {plan.tuning.seed}"
  console.show_table(title, columns, rows, right=columns[1:])


def _cell(penalty: float | None, metric: Metric) -> str:
  if penalty is None:
    return ""
  return "diverged" if math.isinf(penalty) else f"{metric.sign * penalty:.4f}"


def show_costs(plan: RoundPlan, trials: Sequence[RoundTrial], runs: Mapping[int, RunRecord]) -> None:
  """The trials and steps of the sweep by purpose."""
  tuning = [trial for trial in trials if trial.purpose == TUNE]
  scoring = [trial for trial in trials if trial.purpose != TUNE]
  parts = [f"{len(part)} trials {verb} ({_steps(part, runs):,} steps)"
           for part, verb in ((tuning, "tuned"), (scoring, "scored")) if part]
  console.show(f"\n{' and '.join(parts)}")


def _steps(trials: Sequence[RoundTrial], runs: Mapping[int, RunRecord]) -> int:
  return sum(runs[trial.number].last_step for trial in trials)

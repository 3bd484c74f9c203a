"""The output of a sweep in rounds: the trials of each round and the reason, tuning, verdicts, answer, costs."""

import math
from collections.abc import Sequence

from lora_exp.config.metrics import Metric
from lora_exp.runtime import console
from lora_exp.runtime.console_text import duration
from lora_exp.sweep.rounds.looks import Look
from lora_exp.sweep.rounds.next_round import tuning_penalties
from lora_exp.sweep.rounds.round_plan import TUNE, Results, Round, RoundPlan, RoundTrial
from lora_exp.sweep.rounds.tuning_rounds import best_factor


def show_round(number: int, current: Round) -> None:
  """Shows the trials of a round and the reason for it."""
  count = len(current.trials)
  console.show(f"\nround {number}: {current.why} ({count} trial{'' if count == 1 else 's'})")


def show_time(trained: int, seconds: float, following: int) -> None:
  """Shows the time of the trials so far, and an estimate for those that are known to follow."""
  if following:
    console.show(f"{trained} trials took {duration(seconds)}; at least {following} more, about "
                 f"{duration(seconds / trained * following)}.")


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


def show_look(plan: RoundPlan, look: Look) -> None:
  """A table of the verdicts after a number of seeds."""
  rows = []
  for name, verdict in look.judgement.verdicts.items():
    state = f"{verdict.state}, diverged in {verdict.diverged} of {verdict.seeds}" if verdict.diverged else verdict.state
    rows.append([plan.settings[int(name)].label, verdict.seeds, verdict.gain, _percent(verdict.short),
                 _percent(verdict.at_most), state])  # fmt: skip
  title = (f"After {look.seeds} seeds, with a margin of {look.judgement.margin * 100:g} % of the best gain "
           f"(level {look.level:.2g})")
  console.show_table(title, ["setting", "seeds", "gain", "% short", "at most", "verdict"], rows,
                     right=["gain", "% short", "at most"])  # fmt: skip


def show_answer(plan: RoundPlan, look: Look, spent: str) -> None:
  """Shows the answer or why there is none. `spent`: which limit of the budget ended the sweep."""
  insufficient = f"; insufficient: {_names(plan, look.insufficient)}"
  unjudged = f"; dropped during training and not judged: {_names(plan, look.unjudged)}" if look.unjudged else ""
  if look.answer is not None:
    console.show(f"\nDecided after {look.seeds} seeds: {plan.settings[look.answer].label} is sufficient with the "
                 f"fewest parameters{insufficient}{unjudged}.")
    return
  why = spent or "no further seeds can be added"
  if look.futile:
    why = f"further seeds would give an answer with a probability of only {look.chance:.0%}"
  console.show(f"\nUndecided after {look.seeds} seeds{insufficient}{unjudged}. The sweep stops because {why}.")


def _names(plan: RoundPlan, settings: Sequence[int]) -> str:
  return ", ".join(plan.settings[n].label for n in settings) or "none"


def show_costs(plan: RoundPlan, trials: Sequence[RoundTrial], results: Results) -> None:
  """The trials and steps of the sweep by purpose, and as a share of the full grid if the sweep decides."""
  tuning = [trial for trial in trials if trial.purpose == TUNE]
  scoring = [trial for trial in trials if trial.purpose != TUNE]
  parts = [f"{len(part)} trials {verb} ({_steps(part, results):,} steps)"
           for part, verb in ((tuning, "tuned"), (scoring, "scored")) if part]
  console.show(f"\n{' and '.join(parts)}")
  if plan.decision is not None:
    full = full_grid(plan)
    steps = full * max(results[trial.number].steps for trial in trials)
    saved = f": {1 - _steps(trials, results) / steps:.0%} of its steps saved" if steps else ""
    console.show(f"The full grid, every setting with {plan.decision.looks[-1]} seeds"
                 f"{' at every factor' if plan.tuning else ''}, has {full} trials{saved}.")


def full_grid(plan: RoundPlan) -> int:
  """Trials of the grid that gives every setting all seeds at every factor."""
  factors = 1 if plan.tuning is None else len(plan.tuning.factors)
  return sum(len(setting.seeds) * factors if setting.seeds else 1 for setting in plan.settings)


def _percent(share: float) -> str:
  return "" if not math.isfinite(share) else f"{share * 100:.1f}"


def _steps(trials: Sequence[RoundTrial], results: Results) -> int:
  return sum(results[trial.number].steps for trial in trials)

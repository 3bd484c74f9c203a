"""The budget of a sweep in rounds: what the next round needs, and whether that is too much."""

from lora_exp.sweep.rounds.round_plan import Budget, Results, Round


def exceeded_limits(budget: Budget, results: Results, seconds: float, following: Round) -> str:
  """Which limits the round `following` would exceed, in words; '' for none.

  `results` are those of all trials so far, which took `seconds`. A trial of the next round is assumed to take as many
  steps as the longest one, and as much time as the mean.
  """
  trained, added = len(results), len(following.trials)
  longest = max((result.steps for result in results.values()), default=0)
  steps = sum(result.steps for result in results.values()) + longest * added
  minutes = seconds / 60 * (1 + added / max(trained, 1))
  needs = (
    ("trials", budget.trials, trained + added),
    ("steps", budget.steps, steps),
    ("minutes", budget.minutes, minutes),
  )
  return "; ".join(
    f"the next round would need {need:,.0f} {name} in all, and the budget is {limit:,g}"
    for name, limit, need in needs
    if limit is not None and need > limit
  )

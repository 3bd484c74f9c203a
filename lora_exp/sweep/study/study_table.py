"""The output of a study: a line for each trial that ends, and a table of the best trials."""

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from lora_exp.runtime import console
from lora_exp.sweep.study.study_journal import StudyJournal, in_state
from lora_exp.sweep.study.study_space import Study

MAX_ROWS = 10  # rows of the table if there is one objective
ENDS = (("complete", TrialState.COMPLETE), ("pruned", TrialState.PRUNED), ("failed", TrialState.FAIL))


def trial_line(trial: FrozenTrial, objectives: Sequence[str]) -> str:
  """One line with the number, the parameters and the result of a trial."""
  params = "  ".join(f"{key.rpartition('.')[2]} {_short(value)}" for key, value in trial.params.items())
  return f"trial {trial.number}: {params}  {_end(trial, objectives)}"


def _end(trial: FrozenTrial, objectives: Sequence[str]) -> str:
  if trial.state == TrialState.COMPLETE:
    return "  ".join(_named(name, value) for name, value in zip(objectives, trial.values, strict=True))
  reason = str(trial.user_attrs.get("reason"))
  return f"pruned {reason}" if trial.state == TrialState.PRUNED else f"failed: {reason}"


def show_study(study: Study, journal: StudyJournal) -> None:
  """Shows the best trials, or the Pareto front. Warns if the search space has fewer than `n_trials` points."""
  trials, objectives = journal.all, study.objectives
  if len(trials) < study.n_trials:
    console.show_warning(
      f"the search space has only {len(trials)} distinct trials, all of which are done; "
      f"hydra.sweeper.n_trials={study.n_trials} cannot be reached"
    )
  counts = ", ".join(f"{len(in_state(trials, state))} {name}" for name, state in ENDS if in_state(trials, state))
  if len(objectives) > 1:
    shown = sorted(journal.study.best_trials, key=_reversed_values)
    title = f"Pareto front of {' and '.join(objectives)}: {len(shown)} of {len(trials)} trials ({counts})"
  else:
    best_last = study.signs[0] < 0
    complete = in_state(trials, TrialState.COMPLETE)
    shown = sorted(complete, key=_first_value, reverse=best_last)[:MAX_ROWS]
    title = f"Best of {len(trials)} trials ({counts})"
  params = [key.rpartition(".")[2] for key in study.space]
  rows = [_row(trial, study) for trial in shown]
  console.show_table(title, ["trial", "runs", *params, *objectives], rows, right=params)


def _row(trial: FrozenTrial, study: Study) -> list[object]:
  runs = ", ".join(map(str, study.runs(trial.number)))
  params = [_short(trial.params[key]) for key in study.space]
  values = zip(study.objectives, trial.values, strict=True)
  return [trial.number, runs, *params, *(round(value) if name == "trainable" else value for name, value in values)]


def _first_value(trial: FrozenTrial) -> float:
  return trial.values[0]


def _reversed_values(trial: FrozenTrial) -> list[float]:
  return trial.values[::-1]


def _short(value: object) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


def _named(name: str, value: float) -> str:
  return f"{name} {value:,.0f}" if name == "trainable" else f"{name} {value:.4f}"

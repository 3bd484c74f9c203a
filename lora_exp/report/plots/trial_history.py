"""The trials of a study in the order in which they were chosen."""

from pathlib import Path

import altair as alt
import numpy as np

from lora_exp.report.estimation.estimates import Estimate
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.plots.axes import axis_label, limits, linear
from lora_exp.report.plots.colours import MUTED
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.plots.setting_marks import (
  FULL_NAME,
  legend_entries,
  reference_lines,
  setting_row,
  tooltips,
  value_scales,
)
from lora_exp.report.reading.sweep_ledger import read_sweep_ledger


def trial_history(group: Group, directory: Path) -> Figure | None:
  """The held-out metric by trial with the best so far; pruned trials are hollow, at the value they were pruned with.

  None for a sweep that is not a study, or with fewer than two trials that are done.
  """
  trials = _trials(group, directory)
  done = {n: setting.score.mean for n, setting in trials.items() if setting.seeds}
  if len(done) < 2:
    return None
  metric, last = group.metric, max(trials)
  penalties = {n: metric.sign * value for n, value in done.items()}
  best = min(penalties, key=penalties.__getitem__)
  after = len([n for n in trials if n > best])
  title = f"Trial {best} of 0-{last} has the {metric.best_word} held-out {metric.label}, {done[best]:.4f}"
  if after > 1:
    title += f"; the {after} after it found none {'higher' if metric.higher_is_better else 'lower'}"
  pruned = _pruned_scores({n: setting for n, setting in trials.items() if n not in done})
  return Figure(title, (_panel(group, trials, done, pruned),), "Hollow: pruned trials." if pruned else "",
                legend_entries(group))


def _panel(group: Group, trials: dict[int, Setting], done: dict[int, float], pruned: dict[int, float]
           ) -> alt.LayerChart:
  sign = group.metric.sign
  # A few trials whose learning rate is far too high would flatten the curve of the others.
  shown = sign * np.array([*done.values(), *pruned.values()])
  worst = max(np.quantile(shown, 0.9), -np.inf if group.base is None else sign * group.base)
  around = limits([sign * value for value in shown if value <= worst])
  x = alt.X("x:Q", title="trial", axis=alt.Axis(tickMinStep=1, format="d"))
  y = alt.Y(**linear("y", axis_label(group), around))
  rows = [setting_row(group, trials[n], float(n), Estimate(value, None, 1)) | {"trial": n, "done": n in done}
          for n, value in (done | pruned).items()]
  numbers = sorted(done)
  best = sign * np.minimum.accumulate([sign * done[n] for n in numbers])
  steps = [{"x": n, "y": float(value)} for n, value in zip([*numbers, max(trials)], [*best, best[-1]], strict=True)]
  color, shape = value_scales(group, list(trials.values()))
  tips = [alt.Tooltip("trial:Q"), *tooltips(group)]
  marks = chart(rows).encode(x=x, y=y, color=color, shape=shape, tooltip=tips)
  return layered([
    *reference_lines({FULL_NAME: group.full.score.mean if group.full else None}),
    chart(steps).mark_line(interpolate="step-after", color=MUTED, clip=True).encode(x=x, y=y),
    marks.transform_filter("datum.done").mark_point(filled=True, size=80, opacity=1, clip=True),
    marks.transform_filter("!datum.done").mark_point(filled=False, size=80, opacity=1, clip=True),
  ])


def _trials(group: Group, directory: Path) -> dict[int, Setting]:
  """Trial number in a study -> its setting, from the sweep's ledger; {} if the sweep is not a study."""
  setting_of = {run.number: setting for setting in group.settings for run in setting.runs}
  trials = read_sweep_ledger(directory).study_trials
  return {number: setting_of[runs[0]] for number, runs in trials if runs[0] in setting_of}


def _pruned_scores(trials: dict[int, Setting]) -> dict[int, float]:
  """Number of a pruned trial -> the mean of the last held-out metric of its runs."""
  found = {}
  for n, setting in trials.items():
    curves = [run.curve("eval", setting.metric.name) for run in setting.runs if run.status == "pruned"]
    values = [curve[-1][1] for curve in curves if curve]
    if values:
      found[n] = float(np.mean(values))
  return found

"""The trials of a study in the order in which they were chosen."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.plots.colours import FROZEN, FULL, MUTED, Colours
from lora_exp.report.plots.style import axis_label, figure, legend, limits
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
  fig, [axes] = figure(title)
  colours = Colours(group)
  pruned = _pruned_scores({n: setting for n, setting in trials.items() if n not in done})
  for n, value in (done | pruned).items():
    colour = colours.of(trials[n])
    axes.plot(n, value, "o", ms=6, color=colour, mfc=colour if n in done else "white")
  numbers = sorted(done)
  best_so_far = metric.sign * np.minimum.accumulate([penalties[n] for n in numbers])
  axes.step([*numbers, last], [*best_so_far, best_so_far[-1]], where="post", color=MUTED, lw=1.2, zorder=1)
  if group.full is not None:
    axes.axhline(group.full.score.mean, color=FULL, ls="--", lw=1)
  # A few trials with far too high a learning rate would flatten all others.
  shown = metric.sign * np.array([*done.values(), *pruned.values()])
  worst = max(np.quantile(shown, 0.9), -np.inf if group.base is None else metric.sign * group.base)
  if around := limits([metric.sign * value for value in shown if value <= worst]):
    axes.set_ylim(around)
  axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
  axes.set_xlabel("trial")
  axes.set_ylabel(axis_label(group))
  legend(fig, _handles(colours, group, bool(pruned)))
  return fig


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


def _handles(colours: Colours, group: Group, pruned: bool) -> list[Line2D]:
  """The lines of the legend; `pruned`: there are pruned trials."""
  handles = [*colours.handles(), Line2D([], [], color=MUTED, lw=1.2, label="best so far")]
  if pruned:
    handles.append(Line2D([], [], color=FROZEN, marker="o", mfc="white", ls="", label="pruned"))
  if group.full is not None:
    handles.append(Line2D([], [], color=FULL, ls="--", lw=1, label="full"))
  return handles

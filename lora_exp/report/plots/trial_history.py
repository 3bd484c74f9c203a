"""The trials of a study in the order in which they were chosen."""

from contextlib import suppress
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_exp.config import InputError
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.plots.style import FROZEN, FULL, MUTED, Colours, axis_label, figure, legend, limits
from lora_exp.runtime.json_lines import read_ledger


def history(group: Group, directory: Path) -> Figure | None:
  """The held-out metric by trial, those that were pruned hollow at the value they had, and the best so far as a line.

  None of a sweep that is no study, or where fewer than two trials came to their end.
  """
  trials = _trials(group, directory)
  done = {n: s.score.mean for n, s in trials.items() if s.seeds}
  if len(done) < 2:
    return None
  metric = group.metric
  best = min(done, key=lambda n: metric.sign * done[n])
  after = len([n for n in trials if n > best])
  title = f"Trial {best} of 0-{max(trials)} has the {metric.best_word} held-out {metric.label}, {done[best]:.4f}"
  if after > 1:
    title += f"; the {after} after it found none {'higher' if metric.higher_is_better else 'lower'}"
  made, (axes,) = figure(title)
  colours = Colours(group)
  pruned = {n: value for n, s in trials.items() if n not in done and (value := _last(s)) is not None}
  for n, value in (done | pruned).items():
    colour = colours.of(trials[n])
    axes.plot(n, value, "o", ms=6, color=colour, mfc=colour if n in done else "white")
  numbers = sorted(done)
  best_so_far = metric.sign * np.minimum.accumulate([metric.sign * done[n] for n in numbers])
  axes.step([*numbers, max(trials)], [*best_so_far, best_so_far[-1]], where="post", color=MUTED, lw=1.2, zorder=1)
  if group.full is not None:
    axes.axhline(group.full.score.mean, color=FULL, ls="--", lw=1)
  # A few trials at far too high a rate would flatten all others.
  penalties = metric.sign * np.array([*done.values(), *pruned.values()])
  worst_shown = max(np.quantile(penalties, 0.9), -np.inf if group.base is None else metric.sign * group.base)
  if around := limits([metric.sign * p for p in penalties if p <= worst_shown]):
    axes.set_ylim(around)
  axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
  axes.set_xlabel("trial")
  axes.set_ylabel(axis_label(group))
  legend(made, _handles(colours, group, bool(pruned)))
  return made


def _trials(group: Group, directory: Path) -> dict[int, Setting]:
  """The setting of each trial by its number, from the ledger of the sweep; none where it is no study."""
  rows: list[dict] = []
  with suppress(InputError):  # a damaged ledger costs this picture, and not the report
    rows = [row for row in read_ledger(directory) if row.get("event") == "trial"]
  of = {trial.number: setting for setting in group.settings for trial in setting.trials}
  return {row["study_trial"]: of[row["runs"][0]] for row in rows if row["runs"][0] in of}


def _last(setting: Setting) -> float | None:
  """The held-out metric of a setting whose trials were pruned, where they were."""
  curves = [trial.curve("eval", setting.metric.name) for trial in setting.trials if trial.status == "pruned"]
  values = [curve[-1][1] for curve in curves if curve]
  return float(np.mean(values)) if values else None


def _handles(colours: Colours, group: Group, pruned: bool) -> list[Line2D]:
  handles = [*colours.handles(), Line2D([], [], color=MUTED, lw=1.2, label="best so far")]
  if pruned:
    handles.append(Line2D([], [], color=FROZEN, marker="o", mfc="white", ls="", label="pruned"))
  if group.full is not None:
    handles.append(Line2D([], [], color=FULL, ls="--", lw=1, label="full"))
  return handles

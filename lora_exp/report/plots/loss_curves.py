"""Curves of all trials of a group: the held-out metric, and the training loss."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.plots.run_plots import running_median
from lora_exp.report.plots.style import (
  FROZEN,
  FULL,
  MUTED,
  Colours,
  axis_label,
  figure,
  legend,
  limits,
  log_axis,
  loss_label,
)
from lora_exp.report.statistics.estimates import Estimate

RATIO = 8.0  # of the largest to the smallest loss from where a log scale helps


def curves(group: Group) -> Figure | None:
  """The held-out metric (left) and the running median of the training loss (right), a line a trial."""
  name = group.metric.name
  trials = [trial for trial in group.trials if trial.curve("eval", name) or trial.curves["train"]]
  if not trials:
    return None
  made, (left, right) = figure(_title(group), panels=2, height=4.4)
  colours = Colours(group)
  alpha = 0.9 if len(trials) <= 12 else 0.65
  for setting in group.settings:
    for trial in setting.trials:
      style = {"color": colours.of(setting), "alpha": alpha, "lw": 1.3, "zorder": 3 if setting.reference else 2,
               "ls": "-" if trial.status == "done" else ":"}
      if trial.curve("eval", name) and setting.method != "frozen":
        left.plot(*zip(*trial.curve("eval", name), strict=True), marker=".", ms=4, **style)
      if trial.curves["train"]:
        steps, losses = np.array(trial.curves["train"], dtype=float).T
        places, medians = running_median(losses, max(5, len(steps) // 20), 200)
        right.plot(steps[places], medians, **style)
  held = [y for trial in trials for _, y in trial.curve("eval", name)]
  train = [y for line in right.lines for y in np.asarray(line.get_ydata(), dtype=float)]
  for axes, values in ((left, held), (right, train)):
    _axis(axes, values)
    axes.set_xlabel("step")
  left.set_ylabel(axis_label(group))
  right.set_ylabel(loss_label(group, "training loss, running median"))
  if group.base is not None:
    left.axhline(group.base, color=FROZEN, ls="--", lw=1)
    left.annotate("base", (1, group.base), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", fontsize=8, color=MUTED)
  _legend(made, group, colours)
  return made


def _axis(axes: Axes, values: list[float]) -> None:
  """Log scale where it helps; else without the few losses far above the others, which would flatten them."""
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  if not values:
    return
  if min(values) > 0 and max(values) > RATIO * min(values):
    log_axis(axes.yaxis, values, integers=False)
    return
  high = np.quantile(values, 0.98)
  if found := limits([min(values), float(high)]):
    axes.set_ylim(found)


def _legend(made: Figure, group: Group, colours: Colours) -> None:
  handles = colours.handles()
  if any(s.method == "full" for s in group.settings):
    handles.append(Line2D([], [], color=FULL, lw=2.4, label="full"))
  if any(trial.metrics and trial.status != "done" for trial in group.trials):
    handles.append(Line2D([], [], color=MUTED, ls=":", label="not finished"))
  legend(made, handles)


def _title(group: Group) -> str:
  settings = [s for s in group.settings if s.seeds and s.method != "frozen"]
  count = len([trial for trial in group.trials if trial.metrics])
  text = f"{group.metric.label.capitalize()} by step, a line for each of {count} trial{'s' * (count != 1)}"
  if not settings:
    return text
  best: Setting = min(settings, key=lambda s: s.penalty)
  mean: Estimate = best.score
  return f"{text}: {best.label} has the {group.metric.best_word} held-out {group.metric.label}, {mean.text()}"

"""Curves of all runs of a group: the held-out metric, and the training loss."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lora_exp.report.findings.finding import capital
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.plots.colours import FROZEN, FULL, MUTED, Colours
from lora_exp.report.plots.run_plots import running_median
from lora_exp.report.plots.style import axis_label, figure, legend, limits, log_axis, loss_label

LOG_RATIO = 8.0  # ratio of the largest to the smallest loss from which the axis is logarithmic
FEW_RUNS = 12  # up to this number, runs are drawn nearly opaque


def loss_curves(group: Group) -> Figure | None:
  """The held-out metric (left) and the running median of the training loss (right), a line for each run."""
  runs = [run for run in group.runs if run.curve("eval", group.metric.name) or run.curve("train")]
  if not runs:
    return None
  fig, (left, right) = figure(_title(group), panels=2, height=4.4)
  colours = Colours(group)
  for setting in group.settings:
    _draw_runs(left, right, setting, colours, 0.9 if len(runs) <= FEW_RUNS else 0.65)
  held_out = [value for run in runs for _, value in run.curve("eval", group.metric.name)]
  training = [loss for line in right.lines for loss in np.asarray(line.get_ydata(), dtype=float)]
  _set_axes(left, held_out, axis_label(group))
  _set_axes(right, training, loss_label(group, "training loss, running median"))
  if group.base is not None:
    left.axhline(group.base, color=FROZEN, ls="--", lw=1)
    left.annotate("base", (1, group.base), (-2, 3), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8, color=MUTED)
  legend(fig, _handles(group, colours))
  return fig


def _draw_runs(left: Axes, right: Axes, setting: Setting, colours: Colours, alpha: float) -> None:
  """The held-out metric of each run on the left, its training losses on the right; dotted if it is not done."""
  colour, zorder = colours.of(setting), 3 if setting.method.is_reference else 2
  for run in setting.runs:
    dashes = "-" if run.status == "done" else ":"
    held_out, training = run.curve("eval", setting.metric.name), run.curve("train")
    if held_out and not setting.method.trains_nothing:
      left.plot(*zip(*held_out, strict=True), marker=".", ms=4, color=colour, alpha=alpha, lw=1.3,
                zorder=zorder, ls=dashes)
    if training:
      steps, losses = np.array(training, dtype=float).T
      places, medians = running_median(losses, max(5, len(steps) // 20), 200)
      right.plot(steps[places], medians, color=colour, alpha=alpha, lw=1.3, zorder=zorder, ls=dashes)


def _set_axes(axes: Axes, values: list[float], label: str) -> None:
  """Sets labels, and a logarithmic axis if the values span LOG_RATIO; else limits that exclude the highest 2 %."""
  axes.set_xlabel("step")
  axes.set_ylabel(label)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  if not values:
    return
  if min(values) > 0 and max(values) > LOG_RATIO * min(values):
    log_axis(axes.yaxis, values, integers=False)
  elif around := limits([min(values), float(np.quantile(values, 0.98))]):
    axes.set_ylim(around)


def _handles(group: Group, colours: Colours) -> list[Line2D]:
  """The lines of the legend."""
  handles = colours.handles()
  if any(s.method.trains_everything for s in group.settings):
    handles.append(Line2D([], [], color=FULL, lw=2.4, label="full"))
  if any(run.metrics and run.status != "done" for run in group.runs):
    handles.append(Line2D([], [], color=MUTED, ls=":", label="not finished"))
  return handles


def _title(group: Group) -> str:
  count = len([run for run in group.runs if run.metrics])
  title = f"{capital(group.metric.label)} by step, a line for each of {count} trial{'s' * (count != 1)}"
  settings = [s for s in group.settings if s.seeds and not s.method.trains_nothing]
  if not settings:
    return title
  best = min(settings, key=penalty)
  return f"{title}: {best.label} has the {group.metric.best_word} held-out {group.metric.label}, {best.score.text()}"

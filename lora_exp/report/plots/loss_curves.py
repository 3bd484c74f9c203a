"""Curves of all runs of a group: the held-out metric, and the training loss."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from lora_exp.report.estimation.running_median import running_median
from lora_exp.report.findings.finding import capital
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import penalty
from lora_exp.report.plots.axes import axis_label, limits, linear, logarithmic, loss_label
from lora_exp.report.plots.colours import Colours, evenly_picked
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.plots.setting_marks import legend_entries, reference_lines, value_scales

LOG_RATIO = 8.0  # of the largest to the smallest loss, from which the axis is logarithmic
FEW_RUNS = 12  # up to this number of runs, lines are nearly opaque
MOST_POINTS, FEWEST_POINTS = 60, 8  # per curve
ALL_POINTS = 2000  # per panel, approximately
DIGITS = 5  # significant digits of a value in the page

Curve = Sequence[tuple[float, float]]  # step, value


def loss_curves(group: Group) -> Figure | None:
  """The held-out metric (left) and the running median of the training loss (right), a line for each run."""
  held_out, training = _held_out(group), _training(group)
  if not held_out and not training:
    return None
  panels = []
  if held_out:
    panels.append(_panel(group, held_out, axis_label(group), legend=True, base=group.base))
  if training:
    panels.append(_panel(group, training, loss_label(group, "training loss, running median"), legend=not held_out))
  unfinished = any(run.metrics and run.status != "done" for run in group.runs)
  return Figure(_title(group), tuple(panels), "Dashed: trials that are not done." if unfinished else "",
                legend_entries(group))


def _held_out(group: Group) -> list[dict[str, Any]]:
  return _rows(group, [run.curve("eval", group.metric.name) for run in group.runs])


def _training(group: Group) -> list[dict[str, Any]]:
  return _rows(group, [_smoothed(run.curve("train")) for run in group.runs])


def _rows(group: Group, curves: Sequence[Curve]) -> list[dict[str, Any]]:
  """The points of the curves of `group.runs`, without those of a frozen base."""
  colours = Colours(group)
  setting_of = {id(run): setting for setting in group.settings for run in setting.runs}
  most = min(MOST_POINTS, max(FEWEST_POINTS, ALL_POINTS // max(1, len(curves))))
  rows = []
  for run, curve in zip(group.runs, curves, strict=True):
    setting = setting_of[id(run)]
    if setting.method.trains_nothing:
      continue
    fixed = {"trial": run.number, "setting": setting.label, "series": colours.name(setting),
             "done": run.status == "done"}
    rows += [{"step": step, "y": float(f"{value:.{DIGITS}g}"), **fixed} for step, value in evenly_picked(curve, most)]
  return rows


def _smoothed(curve: Curve) -> Curve:
  """The running median over a twentieth of the steps, or five."""
  if not curve:
    return curve
  steps, losses = np.array(curve, dtype=float).T
  places, medians = running_median(losses, max(5, len(steps) // 20), MOST_POINTS)
  return [(float(step), float(value)) for step, value in zip(steps[places], medians, strict=True)]


def _panel(group: Group, rows: list[dict[str, Any]], label: str, legend: bool, base: float | None = None
           ) -> alt.LayerChart:
  """A line for each trial. The axis is logarithmic if the values span LOG_RATIO, else it omits the highest 2 %."""
  values = [row["y"] for row in rows]
  if min(values) > 0 and max(values) > LOG_RATIO * min(values):
    y = alt.Y(**logarithmic("y", label, values))
  else:
    around = limits([min(values), float(np.quantile(values, 0.98))])
    rows = rows if around is None else _below(rows, around[1])
    y = alt.Y(**linear("y", label, around))
  x = alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1))
  color, _ = value_scales(group, [s for s in group.settings if not s.method.trains_nothing], legend)
  trials = len({row["trial"] for row in rows})
  tips = [alt.Tooltip("setting:N"), alt.Tooltip("trial:Q"), alt.Tooltip("step:Q"), alt.Tooltip("y:Q", title=label)]
  data = chart(rows).encode(x=x, y=y, color=color, detail="trial:N")
  lines = data.mark_line(aria=False, strokeWidth=1.6, strokeOpacity=0.9 if trials <= FEW_RUNS else 0.6).encode(
    strokeDash=alt.StrokeDash("done:N", scale=alt.Scale(domain=[True, False], range=[[1, 0], [3, 3]]), legend=None))
  dots = data.transform_filter("!datum.edge").mark_point(aria=False, filled=True, size=60, fillOpacity=0,
                                                         strokeOpacity=0).encode(tooltip=tips)
  return layered([*reference_lines({"base": base}), lines, dots])


def _below(rows: Sequence[dict[str, Any]], top: float) -> list[dict[str, Any]]:
  """The curves cut at `top`, with a gap where they are above it.

  The plot could clip them instead, but a clipped line takes thirty times as long to draw.
  """
  below: list[dict[str, Any]] = []
  for i, row in enumerate(rows):
    last = rows[i - 1] if i and rows[i - 1]["trial"] == row["trial"] else row
    if (last["y"] > top) != (row["y"] > top):
      share = (top - last["y"]) / (row["y"] - last["y"])
      below.append(row | {"step": last["step"] + share * (row["step"] - last["step"]), "y": top, "edge": True})
    below.append(row if row["y"] <= top else row | {"y": None, "edge": True})
  return below


def _title(group: Group) -> str:
  count = len([run for run in group.runs if run.metrics and not run.method.trains_nothing])
  title = f"{capital(group.metric.label)} by step, a line for each of {count} trial{'s' * (count != 1)}"
  settings = [s for s in group.settings if s.seeds and not s.method.trains_nothing]
  if not settings:
    return title
  best = min(settings, key=penalty)
  return f"{title}: {best.label} has the {group.metric.best_word} held-out {group.metric.label}, {best.score.text()}"

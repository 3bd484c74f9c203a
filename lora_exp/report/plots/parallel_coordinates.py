"""A line for each setting through its values to its metric."""

from typing import Any

import altair as alt
import numpy as np

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import short_name, value_text
from lora_exp.report.plots.axes import and_list
from lora_exp.report.plots.colours import BEST, INK, MUTED, VIRIDIS
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.plots.setting_marks import setting_row, tooltips

MOST_KEYS = 7
MOST_NAMES = 12  # maximum number of labelled values on an axis


def parallel_coordinates(group: Group) -> Figure | None:
  """The lines, coloured by their metric; None unless three keys or more vary."""
  keys = [k for k in group.keys if len(group.levels(k)) > 1][:MOST_KEYS]
  settings = [s for s in group.adapted if all(k in s.values for k in keys)]
  if len(keys) < 3 or len(settings) < 2:
    return None
  penalties = np.array([s.penalty for s in settings])
  best = settings[int(np.argmin(penalties))]
  heights = {key: _heights(group.levels(key)) for key in keys}
  names = [*(short_name(key) for key in keys), group.metric.label]
  scores = group.metric.sign * penalties
  span = float(scores.max() - scores.min()) or 1.0
  rows = []
  for i, setting in enumerate(settings):
    shift = 0.012 * (i % 5 - 2)  # keeps lines through the same values apart
    places = [heights[key][setting.values[key]] + shift for key in keys]
    places.append(float((scores[i] - scores.min()) / span))
    fixed = {k: v for k, v in setting_row(group, setting, 0.0, setting.score).items() if isinstance(v, str)}
    rows += [{"axis": name, "place": place, "line": i, "penalty": float(penalties[i]), "best": setting is best, **fixed}
             for name, place in zip(names, places, strict=True)]
  marks = [{"axis": name, "place": place, "text": text} for name, key in zip(names, keys, strict=False)
           for place, text in _names(heights[key])]
  marks += [{"axis": group.metric.label, "place": f, "text": f"{scores.min() + f * span:.3f}"} for f in (0, 0.5, 1)]
  top = max(float(np.quantile(penalties, 0.9)), float(penalties.min()) + 1e-9)
  title = (f"Of {len(settings)} settings of {and_list([short_name(k) for k in keys])}, {best.label} has the "
           f"{group.metric.best_word} held-out {group.metric.label}, {best.score.text()}")
  panel = _panel(group, rows, marks, names, (float(penalties.min()), top))
  return Figure(title, (panel,), "Light lines are worse; the best is drawn thick.")


def _panel(group: Group, rows: list[dict[str, Any]], marks: list[dict[str, Any]], names: list[str],
           domain: tuple[float, float]) -> alt.LayerChart:
  x = alt.X("axis:N", sort=names, title=None, scale=alt.Scale(type="point", padding=0.35),
            axis=alt.Axis(labelAngle=0, grid=True, gridColor=MUTED, domain=False, ticks=False))
  y = alt.Y("place:Q", axis=None, scale=alt.Scale(domain=(-0.05, 1.05)))
  color = alt.Color("penalty:Q", scale=alt.Scale(domain=domain, range=list(VIRIDIS), clamp=True), legend=None)
  lines = chart(rows).encode(x=x, y=y, detail="line:N", tooltip=tooltips(group))
  text = chart(marks).encode(x=x, y=y, text="text:N")
  return layered([
    lines.transform_filter("!datum.best").mark_line(strokeOpacity=0.7, strokeWidth=1.2).encode(color=color),
    lines.transform_filter("datum.best").mark_line(color=BEST, strokeWidth=3),
    text.mark_text(align="left", dx=6, color=INK, stroke="white", strokeWidth=3, strokeOpacity=0.8),
    text.mark_text(align="left", dx=6, color=INK),
  ])


def _heights(levels: list[Any]) -> dict[Any, float]:
  """Value -> its height on its axis, from 0 to 1."""
  return {value: i / (len(levels) - 1) if len(levels) > 1 else 0.5 for i, value in enumerate(levels)}


def _names(heights: dict[Any, float]) -> list[tuple[float, str]]:
  """(height, text) of the values that are written along an axis."""
  every = -(-len(heights) // MOST_NAMES)
  return [(height, _short(value_text(value))) for value, height in list(heights.items())[::every]]


def _short(text: str) -> str:
  return text if len(text) <= 18 else f"{text[:17]}…"

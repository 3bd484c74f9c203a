"""Marks of settings: points with their intervals, coloured by verdict or by value, and their tooltips."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from lora_exp.report.estimation.estimates import Estimate
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import key_value
from lora_exp.report.plots.colours import FROZEN, FULL, MUTED, PALETTE, SHAPES, Colours, shape_key
from lora_exp.report.plots.figure import chart

Row = dict[str, Any]
NOT_JUDGED = "not the best of its kind"
# state -> (colour, shape): apart from each other without colour as well
STATES: dict[str, tuple[str, str]] = {
  "sufficient": (PALETTE[0], "circle"),
  "undecided": (PALETTE[5], "diamond"),
  "insufficient": (PALETTE[7], "triangle-down"),
  NOT_JUDGED: ("#8a9299", "circle"),
}
REFERENCE = "reference line"  # the level of shapes that full fine-tuning has
FULL_NAME = "full fine-tuning"
DIVERGED = "M-1,-1L1,1M-1,1L1,-1"  # an ×, as an SVG path
MOST_SEEDS = 10  # values of single seeds in a tooltip


def setting_row(group: Group, setting: Setting, x: float | Estimate, y: Estimate, state: str = NOT_JUDGED) -> Row:
  """The values of a setting for the marks: its place, its intervals, its legend entries, the text for the pointer."""
  x = x if isinstance(x, Estimate) else Estimate(x, None, 1)
  colours = Colours(group)
  key = shape_key(group, colours)
  digits = group.metric.digits
  scores = [f"{value:.{digits}f}" for value in setting.scores.values()]
  lost = [str(run) for run in setting.runs if run.status == "diverged"]
  return {
    "x": x.mean, "x_low": x.low, "x_high": x.high, "y": y.mean, "y_low": y.low, "y_high": y.high,
    "setting": setting.label, "state": FULL_NAME if setting.method.trains_everything else state,
    "series": colours.name(setting),
    "shape": _shape_level(setting, key),
    "score": setting.score.text(digits), "gain": setting.gain.text(digits),
    "share": group.share(setting).text(1, factor=100), "parameters": f"{setting.trainable or 0:,}",
    "seeds": ", ".join(scores[:MOST_SEEDS]) + (", …" if len(scores) > MOST_SEEDS else ""),
    "diverged": f"{len(lost)} of {len(setting.runs)}" if lost else "none",
  }


def _shape_level(setting: Setting, key: str | None) -> str:
  """The level of `shape_key` that decides the shape of a setting."""
  if setting.method.is_reference:
    return REFERENCE
  return key_value(key, setting.values[key]) if key in setting.values else ""


def tooltips(group: Group, judged: bool = False) -> list[alt.Tooltip]:
  """The tooltips of a row of `setting_row`."""
  names = {"setting": "setting", "score": f"held-out {group.metric.label}", "seeds": "by seed", "gain": "gain"}
  names |= {"share": "% of full"} if group.full else {}
  names |= {"parameters": "trainable parameters", "diverged": "diverged trials"}
  names |= {"state": "verdict"} if judged else {}
  return [alt.Tooltip(f"{field}:N", title=title) for field, title in names.items()]


def intervals(rows: Sequence[Row], x: Any, y: Any) -> list[alt.Chart]:
  """The vertical intervals, and horizontal ones where x has any."""
  rule = chart(rows).mark_rule(color=MUTED, strokeWidth=1.4)
  drawn = [rule.encode(x=x, y=alt.Y("y_low:Q"), y2="y_high:Q")]
  if any(row["x_low"] != row["x_high"] for row in rows):
    drawn.append(rule.encode(x=alt.X("x_low:Q"), x2="x_high:Q", y=y))
  return drawn


def points(rows: Sequence[Row], x: Any, y: Any, color: Any, shape: Any, tooltip: Sequence[alt.Tooltip]) -> alt.Chart:
  """A point for each row."""
  return chart(rows).mark_point(filled=True, size=90, opacity=1, stroke="white", strokeWidth=0.7
    ).encode(x=x, y=y, color=color, shape=shape, tooltip=list(tooltip))


def note(rows: Sequence[Row], diverged: bool = False) -> str:
  """Explains the lines and, with `diverged`, the marks of `diverged_marks`."""
  parts = ["Lines: 95 % intervals over seeds."] if any(row["y_low"] != row["y_high"] for row in rows) else []
  parts += ["×: diverged trials."] if diverged and any(row["diverged"] != "none" for row in rows) else []
  return " ".join(parts)


def state_entries(rows: Sequence[Row]) -> tuple[str, ...]:
  """The entries of the legend of `verdict_scales`."""
  return tuple(dict.fromkeys(row["state"] for row in rows))


def verdict_scales(rows: Sequence[Row]) -> tuple[alt.Color, alt.Shape]:
  """Colour and shape by state, with one legend for both; no legend where nothing was judged."""
  states = {**STATES, FULL_NAME: (FULL, "square")}
  present = [state for state in states if any(row["state"] == state for row in rows)]
  legend = alt.Legend(title=None) if len(present) > 1 or present[0] != NOT_JUDGED else None
  color = alt.Color("state:N", legend=legend, scale=alt.Scale(domain=present, range=[states[s][0] for s in present]))
  shape = alt.Shape("state:N", legend=legend, scale=alt.Scale(domain=present, range=[states[s][1] for s in present]))
  return color, shape


def value_scales(group: Group, settings: Sequence[Setting], legend: bool = True) -> tuple[alt.Color, Any]:
  """Colour by the first key that varies, shape by the second."""
  colours = Colours(group)
  colour_of: dict[str, str] = {colours.name(s): colours.of(s) for s in settings}
  names = [key_value(colours.key, level) for level in colours.levels] if colours.key else []
  domain = [*(name for name in names if name in colour_of), *(name for name in colour_of if name not in names)]
  color = alt.Color("series:N", scale=alt.Scale(domain=domain, range=[colour_of[name] for name in domain]),
                    legend=alt.Legend(title=None) if legend and len(domain) > 1 else None)
  key = shape_key(group, colours)
  levels = [key_value(key, level) for level in group.levels(key)] if key else []
  scale = alt.Scale(domain=[*levels, REFERENCE], range=[*SHAPES[: len(levels)], "square"])
  drawn = {_shape_level(s, key) for s in settings}
  shown = [level for level in levels if level in drawn]
  legend_ = alt.Legend(title=None, values=shown) if legend and len(shown) > 1 else None
  return color, alt.Shape("shape:N", scale=scale, legend=legend_)


def legend_entries(group: Group) -> tuple[str, ...]:
  """The entries of the legends of `value_scales`."""
  colours = Colours(group)
  keys = [key for key in (colours.key, shape_key(group, colours)) if key]
  return tuple(key_value(key, level) for key in keys for level in group.levels(key)) or ("setting",)


def reference_lines(lines: Mapping[str, float | None], y: str = "y") -> list[alt.Chart]:
  """Dashed horizontal lines with their names: base, full fine-tuning."""
  rows = [{"name": name, y: value} for name, value in lines.items() if value is not None]
  if not rows:
    return []
  base = chart(rows).encode(y=alt.Y(f"{y}:Q"))
  return [base.mark_rule(strokeDash=[6, 4], color=FROZEN, strokeWidth=1.2),
          base.mark_text(align="right", baseline="bottom", dx=-2, dy=-3, color=MUTED).encode(
            x=alt.value(alt.ExprRef(expr="width")), text="name:N")]


def diverged_marks(group: Group, settings: Sequence[Setting], xs: Sequence[float], x: Any) -> list[alt.Chart]:
  """An × on the worse edge for each setting with diverged trials."""
  rows = []
  for setting, place in zip(settings, xs, strict=True):
    lost = [run for run in setting.runs if run.status == "diverged"]
    if lost:
      rows.append({"x": place, "setting": setting.label, "diverged": f"{len(lost)} of {len(setting.runs)} trials",
                   "trials": ", ".join(map(str, lost))})
  if not rows:
    return []
  edge = alt.value(alt.ExprRef(expr="height - 7")) if group.metric.higher_is_better else alt.value(7)
  tips = [alt.Tooltip(f"{name}:N") for name in ("setting", "diverged", "trials")]
  return [chart(rows).mark_point(shape=DIVERGED, size=60, strokeWidth=2.2, color="#b3261e",
    opacity=1).encode(x=x, y=edge, tooltip=tips)]

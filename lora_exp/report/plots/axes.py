"""Axes, scales and labels that the plots share."""

import textwrap
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from lora_exp.config.metrics import METRICS
from lora_exp.report.grouping.group import Group
from lora_exp.report.plots.colours import evenly_picked

TITLE_LETTERS = 34  # letters per line of an axis title: 220 pixels, the height of the lowest panel
NARROWEST = 1.5  # ratio of the largest to the smallest value from which an axis is logarithmic


def axis_label(group: Group, what: str | None = None) -> str:
  """`what`, by default the group's held-out metric, with its unit, and a note if higher is better."""
  notes = [group.unit] if group.unit else []
  if what is None and group.metric.higher_is_better:
    notes.append("higher is better")
  return _with_notes(what or f"held-out {group.metric.label}", notes)


def loss_label(group: Group, what: str) -> str:
  """`what`, a loss, with its unit, whatever the metric of the group is."""
  return _with_notes(what, [METRICS["loss"].unit] if group.is_text else [])


def _with_notes(name: str, notes: Sequence[str]) -> str:
  return f"{name} ({', '.join(notes)})" if notes else name


def limits(values: Sequence[float], margin: float = 0.08) -> tuple[float, float] | None:
  """A range around the finite values; None if they are all equal or there are none."""
  finite = [v for v in values if np.isfinite(v)]
  if not finite or min(finite) == max(finite):
    return None
  room = margin * (max(finite) - min(finite))
  return min(finite) - room, max(finite) + room


def title_lines(title: str) -> list[str]:
  """The title of an axis in lines that fit a narrow panel, because Vega cuts longer ones."""
  return textwrap.wrap(title, TITLE_LETTERS)


def linear(field: str, title: str, around: tuple[float, float] | None, **axis: Any) -> dict[str, Any]:
  """The arguments of alt.X or alt.Y for a linear axis over the range `around`."""
  scale = alt.Scale(zero=False) if around is None else alt.Scale(domain=around, nice=False, zero=False)
  return {"shorthand": f"{field}:Q", "scale": scale, "axis": alt.Axis(title=title_lines(title), **axis)}


def logarithmic(field: str, title: str, values: Sequence[float], room: float = 1.15) -> dict[str, Any]:
  """The arguments of alt.X or alt.Y for a logarithmic axis with ticks at 1, 2, 5, 10, …; linear for a short range."""
  values = [v for v in values if v > 0]
  if not values or max(values) / min(values) < NARROWEST:
    return linear(field, title, limits(values, 0.2), format=",.4~g" if not values or max(values) < 1e6 else "~s")
  low, high = min(values) / room, max(values) * room
  format_ = "~s" if min(values) >= 1 else "~g"
  scale = alt.Scale(type="log", domain=(low, high), nice=False)
  return {"shorthand": f"{field}:Q", "scale": scale,
          "axis": alt.Axis(title=title_lines(title), values=_log_ticks(low, high), format=format_)}


def level_axis(field: str, title: str, values: Sequence[float]) -> dict[str, Any]:
  """The arguments of alt.X for a logarithmic axis with a tick at each of `values`, thinned to ten."""
  scale = alt.Scale(type="log", domain=(min(values) / 1.15, max(values) * 1.15), nice=False)
  return {"shorthand": f"{field}:Q", "scale": scale,
          "axis": alt.Axis(title=title_lines(title), values=evenly_picked(values, 10), format="~g")}


def _log_ticks(low: float, high: float) -> list[float]:
  """1, 2, 5 times powers of ten between `low` and `high`; over more than three decades the powers alone."""
  digits = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0)
  powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
  return [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]


def and_list(words: Sequence[str]) -> str:
  """Joins words, as in 'a, b and c'."""
  return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]

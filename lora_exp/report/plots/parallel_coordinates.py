"""A line for each setting through its values to its metric."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import short_name, value_text
from lora_exp.report.plots.colours import BEST, INK, MUTED
from lora_exp.report.plots.style import and_list, figure

MOST_KEYS = 7
MOST_NAMES = 12  # maximum number of labelled values on an axis


def parallel_coordinates(group: Group) -> Figure | None:
  """The lines, coloured by their metric; None unless three keys or more vary."""
  keys = [k for k in group.keys if len(group.levels(k)) > 1][:MOST_KEYS]
  settings = [s for s in group.adapted if all(k in s.values for k in keys)]
  if len(keys) < 3 or len(settings) < 2:
    return None
  penalties = np.array([s.penalty for s in settings])
  scores = group.metric.sign * penalties
  best = settings[int(np.argmin(penalties))]
  fig, [axes] = figure(f"Of {len(settings)} settings of {and_list([short_name(k) for k in keys])}, {best.label} has "
                       f"the {group.metric.best_word} held-out {group.metric.label}, {best.score.text()}", height=4.8)
  top = max(float(np.quantile(penalties, 0.9)), float(penalties.min()) + 1e-9)
  norm = matplotlib.colors.Normalize(penalties.min(), top)
  colours = matplotlib.colormaps["viridis_r"]
  heights = {key: _heights(group.levels(key)) for key in keys}
  span = float(scores.max() - scores.min()) or 1.0
  for i in np.argsort(-penalties):
    shift = 0.012 * ((int(i) % 5) - 2)  # keeps lines through the same values apart
    y = [heights[key][settings[i].values[key]] + shift for key in keys]
    y.append(float((scores[i] - scores.min()) / span))
    if settings[i] is best:
      axes.plot(range(len(y)), y, color=BEST, lw=2.4, alpha=1.0, zorder=5)
    else:
      axes.plot(range(len(y)), y, color=colours(norm(penalties[i])), lw=1.0, alpha=0.75, zorder=2)
  for x, key in enumerate(keys):
    _draw_axis(axes, x, heights[key])
  axes.axvline(len(keys), color=MUTED, lw=0.8)
  for fraction in (0, 0.5, 1):
    axes.annotate(f"{scores.min() + fraction * span:.3f}", (len(keys), fraction), (5, 0), textcoords="offset points",
                  va="center", fontsize=8)
  axes.set_xticks(range(len(keys) + 1), [*map(short_name, keys), group.metric.label])
  axes.set_xlim(-0.15, len(keys) + 0.35)
  axes.set_yticks([])
  axes.grid(False)
  axes.spines[["left", "bottom"]].set_visible(False)
  return fig


def _heights(levels: list[Any]) -> dict[Any, float]:
  """Value -> its height on its axis, from 0 to 1."""
  return {value: i / (len(levels) - 1) if len(levels) > 1 else 0.5 for i, value in enumerate(levels)}


def _draw_axis(axes: Axes, x: int, heights: dict[Any, float]) -> None:
  """A vertical line with the values of one key."""
  axes.axvline(x, color=MUTED, lw=0.8)
  every = -(-len(heights) // MOST_NAMES)
  for value, height in list(heights.items())[::every]:
    axes.annotate(value_text(value), (x, height), (5, 0), textcoords="offset points", va="center", fontsize=8,
                  color=INK, bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6})

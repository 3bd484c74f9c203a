"""The look of every figure: titles that are sentences, axes, legends, and labels that do not overlap."""

import re
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from lora_exp.config.metrics import METRICS
from lora_exp.report.grouping.group import Group
from lora_exp.report.plots.colours import GRID, INK, MUTED, evenly_picked
from lora_exp.report.plots.run_plots import short_count

WIDTH = 8.4  # inches
DPI = 200  # sharp at twice the size on a page
FONT_SIZE = 9.5  # points
STYLE: Any = {"font.size": FONT_SIZE, "axes.labelsize": FONT_SIZE, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
        "text.color": INK, "axes.linewidth": 0.8, "mathtext.fontset": "dejavusans", "text.parse_math": False}
TITLE_WIDTH = 88  # characters of a line
NO_BREAK = re.compile(r" ± |(?<=rank) (?=\d)|(?<=lr) (?=\d)")  # spaces at which titles are not broken


def figure(title: str, height: float = 4.6, panels: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
  """A figure with `panels` axes in a row under a title that is a sentence."""
  with matplotlib.rc_context(STYLE):
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = [fig.add_subplot(1, panels, i + 1, **kwargs) for i in range(panels)]
    set_title(fig, title)
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=GRID, lw=0.6)
    ax.set_axisbelow(True)
  return fig, axes


def set_title(fig: Figure, title: str) -> None:
  """Sets the title of a figure, in lines of similar length."""
  title = NO_BREAK.sub(_no_break, title)
  title = title[:1].upper() + title[1:]
  lines = len(textwrap.wrap(title, TITLE_WIDTH))
  even = TITLE_WIDTH if lines < 2 else min(TITLE_WIDTH, len(title) // lines + 10)  # no last line of one word
  fig.suptitle(textwrap.fill(title, even), x=0.012, ha="left", fontsize=11, fontweight="bold")


def _no_break(match: re.Match[str]) -> str:
  return match[0].replace(" ", "\xa0")


def save(fig: Figure, path: Path) -> None:
  """Writes a PNG, with identical bytes for identical figures."""
  with matplotlib.rc_context(STYLE), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph")  # characters that the font lacks are drawn as boxes
    fig.savefig(path, dpi=DPI, metadata={"Software": None})


def log_axis(axis: Any, values: Sequence[float], integers: bool = True) -> None:
  """A log scale with few, plain tick labels: 1k, 2k, 5k; nothing if the values are equal or not positive."""
  values = [v for v in values if v > 0]
  if not values:
    return
  if max(values) / min(values) < 1.5:
    axis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    big = max(values) >= 1e6 and max(values) / min(values) > 1.05
    axis.set_major_formatter(FuncFormatter(_count if big else _plain))
    return
  span = np.log10(max(values) / min(values))
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
  axis.set_major_locator(LogLocator(10, subs=(1.0,) if span > 3 else (1.0, 2.0, 5.0), numticks=12))
  axis.set_minor_formatter(NullFormatter())
  axis.set_major_formatter(FuncFormatter(_count if integers else _short))


def level_ticks(axis: Any, values: Sequence[float]) -> None:
  """A log scale with a tick at each of `values`, thinned to ten."""
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
  axis.set_major_locator(FixedLocator(evenly_picked(values, 10)))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(FuncFormatter(_short))


def _count(value: float, _: int) -> str:
  return short_count(value) if value >= 1 else f"{value:g}"


def _plain(value: float, _: int) -> str:
  return f"{value:,.10g}"


def _short(value: float, _: int) -> str:
  return f"{value:g}"


def axis_label(group: Group, what: str | None = None) -> str:
  """`what`, by default the held-out metric of the group, with the metric's unit, and its direction if it is upwards."""
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
  """A range around the finite values; None if they are equal."""
  finite = [v for v in values if np.isfinite(v)]
  if not finite or min(finite) == max(finite):
    return None
  room = margin * (max(finite) - min(finite))
  return min(finite) - room, max(finite) + room


def legend(fig: Figure, handles: Sequence[Line2D]) -> None:
  """A legend below the axes, in rows of about one length that fit the width of the figure."""
  if handles:
    longest = max(len(str(handle.get_label())) for handle in handles)
    most = max(1, min(8, int(WIDTH * 72 / (5.2 * longest + 42))))  # points: a letter; a line and the space around it
    lines = -(-len(handles) // most)
    across = -(-len(handles) // lines)
    fig.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=8.5)


def colour_bar(fig: Figure, image: Any, axes: Any, label: str) -> None:
  """The colour bar of an image, in the font size of the axes."""
  bar = fig.colorbar(image, ax=axes, shrink=0.9)
  bar.set_label(label, size=FONT_SIZE, color=INK)
  bar.ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=MUTED)
  bar.outline.set_edgecolor(MUTED)


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]], size: float = 8.0) -> None:
  """Places labels next to points (x, y, text) without covering points or labels; labels without room are omitted."""
  fig = axes.figure
  assert isinstance(fig, Figure)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph")
    fig.draw_without_rendering()
  to_points = 72 / fig.dpi
  at = [[float(v) * to_points for v in axes.transData.transform((x, y))] for x, y, _ in points]
  box = [float(v) * to_points for v in axes.bbox.extents]
  taken = [[x - 4, y - 4, x + 4, y + 4] for x, y in at]
  taken += [[float(v) * to_points for v in text.get_window_extent().extents] for text in axes.texts]
  for (px, py), (x, y, text) in zip(at, points, strict=True):
    width, height = 0.56 * size * len(text), 1.25 * size
    for dx, dy in ((7, -height - 3), (7, 3), (-width - 7, -height - 3), (-width - 7, 3), (-width / 2, -height - 7),
                   (-width / 2, 7), (7, 13), (-width - 7, 13)):
      spot = [px + dx, py + dy, px + dx + width, py + dy + height]
      inside = spot[0] >= box[0] and spot[1] >= box[1] and spot[2] <= box[2] + 4 and spot[3] <= box[3]
      if inside and not any(_overlap(spot, other) for other in taken):
        axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=size, color=INK, va="bottom")
        taken.append(spot)
        break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def and_list(words: list[str]) -> str:
  """As 'a, b and c'."""
  return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]

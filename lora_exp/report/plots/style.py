"""One look for every picture: colours that the colour-blind tell apart, titles that are sentences, labels that fit."""

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
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import say, word
from lora_exp.report.plots.run_plots import _short

INK, MUTED, GRID = "#222222", "#666666", "#d9d9d9"
WORDS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f6000", "#555555")  # Okabe and Ito
FULL, FROZEN = "#222222", "#888888"
MARKERS = "osD^vPX*<>hp"
WIDTH, DPI, SIZE = 8.4, 200, 9.5  # inches; dots an inch: sharp at twice the size; points
FONT: Any = {"font.size": SIZE, "axes.labelsize": SIZE, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
        "text.color": INK, "axes.linewidth": 0.8, "mathtext.fontset": "dejavusans", "text.parse_math": False}
COLUMNS = 88  # characters of a title's line


class Colours:
  """Colours of settings by the first key that varies: a colour map for numbers, a palette for words."""

  def __init__(self, group: Group):
    first = "method" if decided(group, "lora.rank", "method") else "lora.rank"
    keys = [k for k in (first, *group.keys) if k in group.keys and len(group.levels(k)) > 1]
    self.key: str | None = keys[0] if keys else None
    self.levels = group.levels(self.key) if self.key else []
    self.numeric = len(self.levels) > 1 and all(isinstance(v, int | float) for v in self.levels)

  def of(self, setting: Setting) -> Any:
    if setting.reference:
      return FULL if setting.method == "full" else FROZEN
    return self.level(setting.values.get(self.key)) if self.key and self.key in setting.values else WORDS[0]

  def level(self, value: Any) -> Any:
    """The colour of one level."""
    place = self.levels.index(value)
    if not self.numeric:
      return WORDS[place % len(WORDS)]
    return matplotlib.colormaps["viridis"](0.05 + 0.8 * place / max(1, len(self.levels) - 1))

  def handles(self, most: int = 12) -> list[Line2D]:
    """A legend of the levels, evenly picked if there are many."""
    return [Line2D([], [], color=self.level(v), lw=2.4, label=say(self.key or "", v)) for v in few(self.levels, most)]

  @property
  def word(self) -> str:
    return "" if self.key is None else "targets" if self.key == "lora.targets" else word(self.key)


def few(values: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the values, the first and the last among them."""
  return list(values) if len(values) <= most else [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]


def decided(group: Group, key: str, by: str) -> bool:
  """Whether each value of `by` goes with one value of `key`, or none."""
  pairs = {(s.values[by], s.values.get(key)) for s in group.settings if by in s.values and not s.reference}
  return len(pairs) == len({value for value, _ in pairs}) > 0


def markers(group: Group, colours: Colours) -> dict[Any, str]:
  """A marker for each level of the second key that varies."""
  key = second_key(group, colours)
  return {} if key is None else {v: MARKERS[i % len(MARKERS)] for i, v in enumerate(group.levels(key))}


def second_key(group: Group, colours: Colours) -> str | None:
  """The key that markers show: words before numbers."""
  rest = [k for k in group.keys if k != colours.key and not decided(group, k, colours.key or "")
          and 1 < len(group.levels(k)) <= len(MARKERS)]
  return next((k for k in rest if isinstance(group.levels(k)[0], str)), rest[0] if rest else None)


def figure(title: str, height: float = 4.6, panels: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
  """A figure with `panels` axes in a row under a title that is a sentence."""
  with matplotlib.rc_context(FONT):
    made = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = [made.add_subplot(1, panels, i + 1, **kwargs) for i in range(panels)]
    set_title(made, title)
  for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color=GRID, lw=0.6)
    ax.set_axisbelow(True)
  return made, axes


def set_title(made: Figure, title: str) -> None:
  kept = re.sub(r" ± |(?<=rank) (?=\d)|(?<=lr) (?=\d)", lambda m: m[0].replace(" ", "\xa0"), title)  # on one line
  title = kept[:1].upper() + kept[1:]
  lines = len(textwrap.wrap(title, COLUMNS))
  even = COLUMNS if lines < 2 else min(COLUMNS, len(title) // lines + 10)  # no last line of one word
  made.suptitle(textwrap.fill(title, even), x=0.012, ha="left", fontsize=11, fontweight="bold")


def save(made: Figure, path: Path) -> None:
  """Writes a PNG, the same bytes for the same figure."""
  with matplotlib.rc_context(FONT), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph")  # names in a script that the font lacks: boxes, and no noise
    made.savefig(path, dpi=DPI, metadata={"Software": None})


def log_axis(axis: Any, values: Sequence[float], integers: bool = True) -> None:
  """A log scale with few, plain tick labels: 1k, 2k, 5k; nothing if the values are equal or not positive."""
  values = [v for v in values if v > 0]
  if not values:
    return
  if max(values) / min(values) < 1.5:
    axis.set_major_locator(MaxNLocator(5, min_n_ticks=2))
    big = max(values) >= 1e6 and max(values) / min(values) > 1.05
    axis.set_major_formatter(FuncFormatter(lambda v, _: _short(v) if big else f"{v:,.10g}"))
    return
  span = np.log10(max(values) / min(values))
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
  axis.set_major_locator(LogLocator(10, subs=(1.0,) if span > 3 else (1.0, 2.0, 5.0), numticks=12))
  axis.set_minor_formatter(NullFormatter())
  axis.set_major_formatter(FuncFormatter(lambda v, _: _short(v) if integers and v >= 1 else f"{v:g}"))


def level_ticks(axis: Any, values: Sequence[float]) -> None:
  """A log scale with a tick at each of `values`, thinned to ten."""
  getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
  axis.set_major_locator(FixedLocator(few(values, 10)))
  axis.set_minor_locator(NullLocator())
  axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def axis_label(group: Group, what: str | None = None) -> str:
  """`what`, by default the held-out metric of the group, with the unit of the metric and its direction if not down."""
  metric = group.metric
  notes = [group.unit] if group.unit else []
  if what is None and metric.higher_is_better:
    notes.append("higher is better")
  return _with_notes(what or f"held-out {metric.label}", notes)


def loss_label(group: Group, what: str) -> str:
  """`what`, a loss, with its unit, whatever the metric of the group is."""
  return _with_notes(what, [] if group.has_numbers else [METRICS["loss"].unit])


def _with_notes(name: str, notes: Sequence[str]) -> str:
  return f"{name} ({', '.join(notes)})" if notes else name


def limits(values: Sequence[float], margin: float = 0.08) -> tuple[float, float] | None:
  """A range around the finite values; None if they are equal."""
  finite = [v for v in values if np.isfinite(v)]
  if not finite or min(finite) == max(finite):
    return None
  room = margin * (max(finite) - min(finite))
  return min(finite) - room, max(finite) + room


def legend(made: Figure, handles: Sequence[Line2D]) -> None:
  """A legend below the picture, its rows of about the same length, and no longer than the picture is wide."""
  if handles:
    longest = max(len(str(handle.get_label())) for handle in handles)
    most = max(1, min(8, int(WIDTH * 72 / (5.2 * longest + 42))))  # points: a letter; a line and the space around it
    lines = -(-len(handles) // most)
    across = -(-len(handles) // lines)
    made.legend(handles=handles, loc="outside lower center", ncols=across, frameon=False, fontsize=8.5)


def colour_bar(made: Figure, image: Any, axes: Any, label: str) -> None:
  """The scale of an image's colours, its words as large as the axes'."""
  bar = made.colorbar(image, ax=axes, shrink=0.9)
  bar.set_label(label, size=SIZE, color=INK)
  bar.ax.tick_params(labelsize=8.5, color=MUTED, labelcolor=MUTED)
  bar.outline.set_edgecolor(MUTED)


def name_points(axes: Axes, points: Sequence[tuple[float, float, str]], size: float = 8.0) -> None:
  """Labels beside points, where they cover neither a point nor a label; one that fits nowhere is left out."""
  made = axes.figure
  assert isinstance(made, Figure)
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph")
    made.draw_without_rendering()
  to_points = 72 / made.dpi
  at = [[float(v) * to_points for v in axes.transData.transform((x, y))] for x, y, _ in points]
  box = [float(v) * to_points for v in axes.bbox.extents]
  taken = [[x - 4, y - 4, x + 4, y + 4] for x, y in at]
  taken += [[float(v) * to_points for v in text.get_window_extent().extents] for text in axes.texts]
  for (px, py), (x, y, text) in zip(at, points, strict=True):
    wide, high = 0.56 * size * len(text), 1.25 * size
    for dx, dy in ((7, -high - 3), (7, 3), (-wide - 7, -high - 3), (-wide - 7, 3), (-wide / 2, -high - 7),
                   (-wide / 2, 7), (7, 13), (-wide - 7, 13)):
      spot = [px + dx, py + dy, px + dx + wide, py + dy + high]
      inside = spot[0] >= box[0] and spot[1] >= box[1] and spot[2] <= box[2] + 4 and spot[3] <= box[3]
      if inside and not any(_overlap(spot, other) for other in taken):
        axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", fontsize=size, color=INK, va="bottom")
        taken.append(spot)
        break


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _and(words: list[str]) -> str:
  return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]

"""Singular values of what adapters learned."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from lora_exp.report.findings.used_rank import PERCENT, of_rank
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import LearnedUpdates
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK
from lora_exp.report.plots.axes import linear, logarithmic
from lora_exp.report.plots.colours import FROZEN, FULL, Colours, evenly_picked
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.verdicts.tuning import best_by
from lora_exp.runtime.spectrum import ENERGY

MOST_LINES = 12
Line = tuple[str, str, list[list[float]]]  # name, colour, the singular values of each module
ROUNDING = 1e-6  # singular values below this share of the largest are float32's rounding, and not drawn


def update_spectrum_plot(group: Group, updates: LearnedUpdates) -> Figure | None:
  """The spectra of each rank's updates (or of each setting's), and of full fine-tuning; None if none was read."""
  learned = updates.settings(group)
  settings = [s for s in learned if not s.method.is_reference]
  if not settings:
    return None
  if RANK in group.keys and all(RANK in s.values for s in settings):
    settings = list(best_by(settings, RANK).values())
  colours = Colours(group)
  lines: list[Line] = [(s.label, colours.of(s), _singular_values(s, updates))
                       for s in evenly_picked(settings, MOST_LINES)]
  if group.full is not None and any(s is group.full for s in learned):
    lines.append(("full", FULL, _singular_values(group.full, updates)))
  top = max(settings, key=updates.rank)
  used, directions = (updates.estimate(top, name) for name in ("effective_rank", "directions"))
  by = f" by {top.label}" if len(settings) > 1 else ""
  return spectrum_figure(f"{of_rank(updates, top)}, {used.text(1)} directions are used{by} (effective rank), and "
                         f"{PERCENT} of the energy of ΔW lies in {directions.text(1)}", lines)


def _singular_values(setting: Setting, updates: LearnedUpdates) -> list[list[float]]:
  """The singular values of each module of each counted run."""
  return [spectrum.singular_values for run in setting.counted.values() for spectrum in updates.spectra[run.number]]


def spectrum_figure(title: str, lines: Sequence[Line]) -> Figure:
  """Singular values (left) and the share of ‖ΔW‖² in the largest (right), the mean over a line's modules."""
  names = [name if len(name) <= 40 else f"{name[:39]}…" for name, _, _ in lines]
  sigma = _rows(names, [_mean_padded(modules) for _, _, modules in lines])
  largest = max((row["y"] for row in sigma), default=0.0)
  sigma = [row for row in sigma if row["y"] > ROUNDING * max(largest, 1e-300)]
  share = _rows(names, [100 * _mean_padded([_energy(values) for values in modules], last=True)
                        for _, _, modules in lines])
  color = alt.Color("name:N", scale=alt.Scale(domain=names, range=[colour for _, colour, _ in lines]))
  legend = alt.Legend(title=None)
  left = _panel(sigma, color.legend(legend), "direction, the largest first",
                logarithmic("y", "singular value of ΔW", [row["y"] for row in sigma]))
  right = _panel(share, color.legend(None), "number of directions",
                 linear("y", "share of ‖ΔW‖² in the largest directions (%)", (0.0, 103.0)))
  line = chart([{"y": 100 * ENERGY, "name": PERCENT}]).encode(y="y:Q")
  return Figure(title, (layered(left), layered([line.mark_rule(color=FROZEN, strokeDash=[6, 4]), *right])),
                f"The dashed line is at {PERCENT}.", tuple(names))


def _rows(names: Sequence[str], curves: Sequence[np.ndarray]) -> list[dict[str, Any]]:
  return [{"name": name, "x": i, "y": float(f"{value:.5g}")} for name, curve in zip(names, curves, strict=True)
          for i, value in enumerate(curve, start=1)]


def _panel(rows: list[dict[str, Any]], color: alt.Color, x_title: str, y: dict[str, Any]) -> list[alt.Chart]:
  x = alt.X(**logarithmic("x", x_title, [row["x"] for row in rows]))
  tips = [alt.Tooltip("name:N", title="of"), alt.Tooltip("x:Q", title=x_title), alt.Tooltip("y:Q", format=".4g")]
  data = chart(rows).encode(x=x, y=alt.Y(**y), color=color)
  return [data.mark_line(strokeWidth=1.6), data.mark_point(filled=True, size=30, opacity=1).encode(tooltip=tips)]


def _energy(sigma: Sequence[float]) -> list[float]:
  """The share of Σσ² in the 1, 2, … largest singular values."""
  square = np.square(sigma)
  return list(np.cumsum(square) / max(square.sum(), 1e-300))


def _mean_padded(rows: Sequence[Sequence[float]], last: bool = False) -> np.ndarray:
  """The mean over rows of unequal length, by position; shorter rows are filled with 0, or with their `last` value."""
  longest = max(map(len, rows), default=0)
  filled = [[*row, *[row[-1] if last and row else 0.0] * (longest - len(row))] for row in rows]
  return np.array(filled).mean(0) if rows else np.zeros(0)

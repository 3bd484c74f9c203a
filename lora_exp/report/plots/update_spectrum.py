"""Singular values of the learned updates."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from lora_exp.report.findings.used_rank import PERCENT
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import LearnedUpdates
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK
from lora_exp.report.plots.colours import FULL, MUTED, Colours, evenly_picked
from lora_exp.report.plots.style import figure, legend, log_axis
from lora_exp.report.verdicts.tuning import best_by
from lora_exp.runtime.spectrum import ENERGY

MOST_LINES = 12
Line = tuple[str, Any, list[list[float]]]  # name, colour, the singular values of each module
ROUNDING = 1e-6  # singular values below this fraction of the largest are rounding errors of float32 and not drawn


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
  return spectrum_figure(f"Of rank {updates.rank(top):g}, {used.text(1)} directions are used (effective rank), and "
                         f"{PERCENT} of the energy of ΔW lies in {directions.text(1)}", lines)


def _singular_values(setting: Setting, updates: LearnedUpdates) -> list[list[float]]:
  """The singular values of each module of each counted run."""
  return [spectrum.singular_values for run in setting.counted.values() for spectrum in updates.spectra[run.number]]


def spectrum_figure(title: str, lines: Sequence[Line]) -> Figure:
  """Singular values (left) and the share of ‖ΔW‖² in the largest (right), the mean over a line's modules."""
  fig, (left, right) = figure(title, panels=2, height=4.4)
  longest = 1
  for _, colour, modules in lines:
    sigma = _mean_padded(modules)
    share = _mean_padded([_energy(values) for values in modules], last=True)
    x = np.arange(1, len(sigma) + 1)
    longest = max(longest, len(x))
    style: dict[str, Any] = {"color": colour, "lw": 1.5, "marker": "o" if len(x) <= 32 else "", "ms": 3.5}
    visible = sigma > ROUNDING * max(float(sigma.max(initial=0.0)), 1e-300)
    left.plot(x[visible], sigma[visible], **style)
    right.plot(x, 100 * share, **style)
  log_axis(left.yaxis, [float(y) for line in left.lines for y in np.asarray(line.get_ydata())], integers=False)
  left.set_ylabel("singular value of ΔW")
  left.set_xlabel("direction, the largest first")
  right.set_ylabel("share of ‖ΔW‖² in the largest directions (%)")
  right.set_xlabel("number of directions")
  right.axhline(100 * ENERGY, color=MUTED, lw=1, ls="--", zorder=1)
  right.annotate(PERCENT, (1, 100 * ENERGY), (-2, 2.5), xycoords=("axes fraction", "data"),
                 textcoords="offset points", ha="right", fontsize=8, color=MUTED)
  right.set_ylim(0, 103)
  for axes in (left, right):
    if longest > 2:
      log_axis(axes.xaxis, [1, longest])
      axes.xaxis.set_minor_locator(NullLocator())
    else:
      axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
  legend(fig, [Line2D([], [], color=colour, lw=2.4, label=name if len(name) <= 40 else name[:39] + "…")
               for name, colour, _ in lines])
  return fig


def _energy(sigma: Sequence[float]) -> list[float]:
  """The share of Σσ² in the 1, 2, … largest singular values."""
  square = np.square(sigma)
  return list(np.cumsum(square) / max(square.sum(), 1e-300))


def _mean_padded(rows: Sequence[Sequence[float]], last: bool = False) -> np.ndarray:
  """The mean over rows of unequal length, by position; shorter rows are filled with 0, or with their `last` value."""
  longest = max(map(len, rows), default=0)
  filled = [[*row, *[row[-1] if last and row else 0.0] * (longest - len(row))] for row in rows]
  return np.array(filled).mean(0) if rows else np.zeros(0)

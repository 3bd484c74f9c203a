"""Singular values of what adapters learned."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from lora_exp.report.findings.finding import RANK
from lora_exp.report.findings.used_rank import PERCENT
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import given, shown
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.plots.style import FULL, MUTED, Colours, few, figure, legend, log_axis
from lora_exp.report.verdicts.tuning import best_by
from lora_exp.runtime.spectrum import ENERGY

MOST_LINES = 12
Line = tuple[str, Any, list[list[float]]]  # name, colour, the singular values of each module


def spectrum(group: Group) -> Figure | None:
  """The singular values of each rank's updates, and the energy in the largest; None if none is known."""
  settings = [s for s in shown(group) if not s.reference]
  if not settings:
    return None
  if RANK in group.keys and all(RANK in s.values for s in settings):
    settings = list(best_by(settings, RANK).values())
  colours = Colours(group)
  picked: list[Setting] = few(settings, MOST_LINES)
  lines: list[Line] = [(s.label, colours.of(s), values_of(s)) for s in picked]
  if group.full in shown(group) and group.full is not None:
    lines.append(("full", FULL, values_of(group.full)))
  top = max(settings, key=given)
  used, most = (top.of(lambda trial, name=name: trial.learned_mean(name)) for name in ("effective_rank", "directions"))
  return spectrum_figure(f"Of rank {given(top):g}, {used.text(1)} directions are used (effective rank), and "
                         f"{PERCENT} of the energy of ΔW lies in {most.text(1)}", lines)


def values_of(s: Setting) -> list[list[float]]:
  return [f.singular_values for trial in s.counted.values() for f in trial.learned]


def spectrum_figure(title: str, lines: Sequence[Line]) -> Figure:
  """Singular values (left) and the share of ‖ΔW‖² in the largest (right), the mean over a line's modules."""
  made, (left, right) = figure(title, panels=2, height=4.4)
  longest = 1
  for _, colour, modules in lines:
    sigma = _mean(modules)
    share = _mean([list(np.cumsum(np.square(m)) / max(np.square(m).sum(), 1e-300)) for m in modules], last=True)
    x = np.arange(1, len(sigma) + 1)
    longest = max(longest, len(x))
    style = {"color": colour, "lw": 1.5, "marker": "o" if len(x) <= 32 else "", "ms": 3.5}
    seen = sigma > 1e-6 * max(float(sigma.max(initial=0.0)), 1e-300)  # below it is float32's rounding
    left.plot(x[seen], sigma[seen], **style)
    right.plot(x, 100 * share, **style)
  log_axis(left.yaxis, [float(y) for line in left.lines for y in np.asarray(line.get_ydata())], integers=False)
  left.set_ylabel("singular value of ΔW")
  right.set_ylabel("share of ‖ΔW‖² in the largest directions (%)")
  right.axhline(100 * ENERGY, color=MUTED, lw=1, ls="--", zorder=1)
  right.annotate(PERCENT, (1, 100 * ENERGY), (-2, 2.5), xycoords=("axes fraction", "data"),
                 textcoords="offset points", ha="right", fontsize=8, color=MUTED)
  right.set_ylim(0, 103)
  for axes in (left, right):
    axes.set_xlabel("direction, the largest first" if axes is left else "number of directions")
    if longest > 2:
      log_axis(axes.xaxis, [1, longest])
      axes.xaxis.set_minor_locator(NullLocator())
    else:
      axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
  legend(made, [Line2D([], [], color=colour, lw=2.4, label=name if len(name) <= 40 else name[:39] + "…")
                for name, colour, _ in lines])
  return made


def _mean(modules: Sequence[Sequence[float]], last: bool = False) -> np.ndarray:
  """Place by place, over lists of unlike length: past its end a list goes on with 0, or with its last value."""
  most = max((len(m) for m in modules), default=0)
  fill = lambda m: [m[-1] if last and m else 0.0] * (most - len(m))
  return np.array([[*m, *fill(m)] for m in modules]).mean(0) if modules else np.zeros(0)

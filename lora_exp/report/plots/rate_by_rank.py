"""Learning rate × rank: the metric as a map, and as a curve for each rank."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK, RATE
from lora_exp.report.plots.colours import BEST, INK, Colours
from lora_exp.report.plots.style import and_list, axis_label, colour_bar, figure, legend, level_ticks, limits
from lora_exp.report.statistics.fits import fit_parabola
from lora_exp.report.verdicts.tuning import best_of

Grid = dict[int, dict[float, Setting]]  # rank -> learning rate -> the best setting
MOST_CELLS = 64  # up to this number, the score is written into each cell


def rate_by_rank(group: Group) -> Figure | None:
  """The map and the curves; None unless both the rank and the rate vary."""
  rates = group.levels(RATE)
  grid = _grid(group, rates)
  if len(group.levels(RANK)) < 2 or len(rates) < 2 or not grid:
    return None
  best = {rank: best_of(by_rate.values()).values[RATE] for rank, by_rate in grid.items()}
  fig, (left, right) = figure(_title(best, rates), panels=2, height=4.8)
  _draw_map(fig, left, group, grid, rates, best)
  colours = Colours(group)
  colour_of = {rank: colours.of_level(rank) if colours.key == RANK else INK for rank in grid}
  for rank, by_rate in grid.items():
    _draw_curve(right, by_rate, rates, colour_of[rank], group.metric.sign)
  level_ticks(right.xaxis, rates)
  penalties = [s.penalty for by_rate in grid.values() for s in by_rate.values()]
  worst = np.quantile(penalties, 0.9)
  if around := limits([group.metric.sign * penalty for penalty in penalties if penalty <= worst], 0.1):
    right.set_ylim(around)
  right.set_xlabel("learning rate (★ fitted best, ✖ on the edge)")
  right.set_ylabel(axis_label(group))
  right.tick_params(axis="x", rotation=35 if len(rates) > 5 else 0)
  legend(fig, [Line2D([], [], color=colour_of[rank], marker="o", ms=4, label=f"rank {rank}") for rank in grid])
  return fig


def _grid(group: Group, rates: Sequence[float]) -> Grid:
  """The best setting of each combination of rank and rate that was tried, sorted by both."""
  grid: Grid = {}
  for rank in group.levels(RANK):
    for rate in rates:
      same = [s for s in group.adapted if s.values.get(RANK) == rank and s.values.get(RATE) == rate]
      if same:
        grid.setdefault(rank, {})[rate] = best_of(same)
  return grid


def _title(best: dict[int, float], rates: Sequence[float]) -> str:
  """`best`: the best rate of each rank."""
  low, high = min(best.values()), max(best.values())
  if low == high:
    title = f"The best learning rate is {low:g} for every rank"
  else:
    title = f"The best learning rate lies between {low:g} and {high:g}, depending on the rank"
  edge = [str(rank) for rank, rate in best.items() if rate in (rates[0], rates[-1])]
  if not edge:
    return f"{title}; inside the grid for each"
  return f"{title}; on the edge of the grid for {'every rank' if len(edge) == len(best) else f'rank {and_list(edge)}'}"


def _draw_curve(axes: Axes, by_rate: dict[float, Setting], rates: Sequence[float], colour: Any, sign: int) -> None:
  """The scores of one rank with their intervals, and the parabola in log rate fitted to `sign` times them."""
  x = np.array(list(by_rate))
  y = [s.score.mean for s in by_rate.values()]
  axes.errorbar(x, y, yerr=[s.score.half or 0.0 for s in by_rate.values()], fmt="o", ms=4, lw=0.9, capsize=2,
                color=colour)
  fit = fit_parabola(list(np.log(x)), [s.penalty for s in by_rate.values()])
  if fit is None:
    axes.plot(x, y, lw=0.8, ls=":", color=colour)
    return
  vertex = float(np.exp(np.clip(fit.vertex, np.log(rates[0]), np.log(rates[-1]))))
  near = np.geomspace(max(x.min(), vertex / 12), min(x.max(), vertex * 12), 60)
  axes.plot(near, sign * fit.at(np.log(near)), lw=1.3, color=colour)
  axes.plot(vertex, sign * fit.at(np.log(np.array(vertex))), marker="*" if x.min() < vertex < x.max() else "X", ms=9,
            color=colour, mec="white", mew=0.6, ls="")


def _draw_map(fig: Figure, axes: Axes, group: Group, grid: Grid, rates: list[float], best: dict[int, float]) -> None:
  """The scores as colours; the best rate of each rank has a frame."""
  ranks = group.levels(RANK)
  scores = np.full((len(ranks), len(rates)), np.nan)
  for rank, by_rate in grid.items():
    for rate, setting in by_rate.items():
      scores[ranks.index(rank), rates.index(rate)] = setting.score.mean
  finite, higher = scores[np.isfinite(scores)], group.metric.higher_is_better
  low, high = float(finite.min()), float(finite.max())
  if higher:  # both norms show the small differences near the best
    norm = matplotlib.colors.PowerNorm(2, min(float(np.quantile(finite, 0.1)), high - 1e-9), high)
  else:
    norm = matplotlib.colors.PowerNorm(0.5, low, max(float(np.quantile(finite, 0.9)), low + 1e-9))
  image = axes.imshow(scores, cmap="viridis" if higher else "viridis_r", aspect="auto", origin="lower", norm=norm)
  axes.grid(False)
  axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], rotation=35 if len(rates) > 5 else 0)
  axes.set_yticks(range(len(ranks)), map(str, ranks))
  axes.set_xlabel("learning rate (boxed: best of its rank)")
  axes.set_ylabel("rank")
  for (i, j), score in np.ndenumerate(scores):
    if np.isfinite(score) and scores.size <= MOST_CELLS:
      dark = norm(score) < 0.55 if higher else norm(score) > 0.45
      axes.text(j, i, f"{score:.3f}", ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
    if best.get(ranks[i]) == rates[j]:
      frame = matplotlib.patches.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, ec=BEST, lw=1.8)
      axes.add_patch(frame)
  colour_bar(fig, image, axes, axis_label(group))

"""Learning rate × rank: the metric as a map, and as curves."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_exp.report.grouping.group import Group
from lora_exp.report.plots.style import INK, Colours, _and, axis_label, colour_bar, figure, legend, level_ticks, limits
from lora_exp.report.statistics.fits import parabola
from lora_exp.report.verdicts.tuning import best_of


def surface(group: Group) -> Figure | None:
  """Rate × rank: the metric as a map, and as curves with a fitted parabola each; None unless both vary."""
  ranks, rates = group.levels("lora.rank"), group.levels("optim.lr")
  if len(ranks) < 2 or len(rates) < 2:
    return None
  cells = {(r, lr): best_of(found) for r in ranks for lr in rates if (found := [
    s for s in group.adapted if s.values.get("lora.rank") == r and s.values.get("optim.lr") == lr])}
  lines = {r: {lr: cells[r, lr] for lr in rates if (r, lr) in cells} for r in ranks}
  lines = {r: line for r, line in lines.items() if line}
  if not lines:
    return None
  best = {r: best_of(line.values()).values["optim.lr"] for r, line in lines.items()}
  low, high = min(best.values()), max(best.values())
  edge = [r for r, lr in best.items() if lr in (rates[0], rates[-1])]
  title = f"The best learning rate is {low:g} for every rank" if low == high else \
    f"The best learning rate lies between {low:g} and {high:g}, depending on the rank"
  ranks_on = "every rank" if len(edge) == len(best) else f"rank {_and(list(map(str, edge)))}" if edge else ""
  title += f"; on the edge of the grid for {ranks_on}" if edge else "; inside the grid for each"
  made, (left, right) = figure(title, panels=2, height=4.8)
  _map(made, left, group, cells, ranks, rates, best)
  colours, sign = Colours(group), group.metric.sign
  for r, line in lines.items():
    x = np.array(list(line))
    y = [s.score.mean for s in line.values()]
    colour = colours.level(r) if colours.key == "lora.rank" else INK
    wide = [s.score.half or 0.0 for s in line.values()]
    right.errorbar(x, y, yerr=wide, fmt="o", ms=4, lw=0.9, capsize=2, color=colour)
    fit = parabola(list(np.log(x)), [s.penalty for s in line.values()])
    if fit is None:
      right.plot(x, y, lw=0.8, ls=":", color=colour)
      continue
    place = float(np.exp(np.clip(fit.place, np.log(rates[0]), np.log(rates[-1]))))
    near = np.geomspace(max(x.min(), place / 12), min(x.max(), place * 12), 60)
    right.plot(near, sign * fit.at(np.log(near)), lw=1.3, color=colour)
    right.plot(place, sign * fit.at(np.log(np.array(place))), marker="*" if x.min() < place < x.max() else "X", ms=9,
               color=colour, mec="white", mew=0.6, ls="")
  level_ticks(right.xaxis, rates)
  penalties = [s.penalty for s in cells.values()]
  if around := limits([sign * p for p in penalties if p <= np.quantile(penalties, 0.9)], 0.1):
    right.set_ylim(around)
  right.set_xlabel("learning rate (★ fitted best, ✖ on the edge)")
  right.set_ylabel(axis_label(group))
  right.tick_params(axis="x", rotation=35 if len(rates) > 5 else 0)
  handles = [Line2D([], [], color=colours.level(r) if colours.key == "lora.rank" else INK, marker="o", ms=4,
                    label=f"rank {r}") for r in lines]
  legend(made, handles)
  return made


def _map(made, axes, group: Group, cells: dict, ranks: list, rates: list, best: dict) -> None:
  grid = np.full((len(ranks), len(rates)), np.nan)
  for (r, lr), setting in cells.items():
    grid[ranks.index(r), rates.index(lr)] = setting.score.mean
  finite = grid[np.isfinite(grid)]
  low, high, higher = float(finite.min()), float(finite.max()), group.metric.higher_is_better
  if higher:  # both norms show the small differences near the best
    norm = matplotlib.colors.PowerNorm(2, min(float(np.quantile(finite, 0.1)), high - 1e-9), high)
  else:
    norm = matplotlib.colors.PowerNorm(0.5, low, max(float(np.quantile(finite, 0.9)), low + 1e-9))
  image = axes.imshow(grid, cmap="viridis" if higher else "viridis_r", aspect="auto", origin="lower", norm=norm)
  axes.grid(False)
  axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates], rotation=35 if len(rates) > 5 else 0)
  axes.set_yticks(range(len(ranks)), map(str, ranks))
  axes.set_xlabel("learning rate (boxed: best of its rank)")
  axes.set_ylabel("rank")
  small = len(ranks) * len(rates) <= 64
  for i, r in enumerate(ranks):
    for j, lr in enumerate(rates):
      if np.isfinite(grid[i, j]) and small:
        dark = image.norm(grid[i, j]) < 0.55 if higher else image.norm(grid[i, j]) > 0.45
        axes.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
      if best.get(r) == lr:
        axes.add_patch(matplotlib.patches.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, ec="#d55e00", lw=1.8))
  colour_bar(made, image, axes, axis_label(group))

"""Settings against each other: rate × rank, bars by targets and methods, parallel coordinates."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_exp.report.groups import Study, say, word
from lora_exp.report.statistics import parabola
from lora_exp.report.style import (
  FROZEN,
  FULL,
  INK,
  MUTED,
  Colours,
  colour_bar,
  figure,
  legend,
  level_ticks,
  limits,
  loss_label,
)
from lora_exp.report.verdicts import best_by, best_of

MOST_BARS = 24
MOST_NAMES = 12  # of values along one axis


def surface(study: Study) -> Figure | None:
  """Rate × rank: the losses as a map, and as curves with a fitted parabola each; None unless both vary."""
  ranks, rates = study.levels("lora.rank"), study.levels("optim.lr")
  if len(ranks) < 2 or len(rates) < 2:
    return None
  cells = {(r, lr): best_of(found) for r in ranks for lr in rates if (found := [
    s for s in study.adapted if s.values.get("lora.rank") == r and s.values.get("optim.lr") == lr])}
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
  _map(made, left, study, cells, ranks, rates, best)
  colours = Colours(study)
  for r, line in lines.items():
    x = np.array(list(line))
    y = [s.loss.mean for s in line.values()]
    colour = colours.level(r) if colours.key == "lora.rank" else INK
    wide = [s.loss.half or 0.0 for s in line.values()]
    right.errorbar(x, y, yerr=wide, fmt="o", ms=4, lw=0.9, capsize=2, color=colour)
    fit = parabola(list(np.log(x)), y)
    if fit is None:
      right.plot(x, y, lw=0.8, ls=":", color=colour)
      continue
    place = float(np.exp(np.clip(fit.place, np.log(rates[0]), np.log(rates[-1]))))
    near = np.geomspace(max(x.min(), place / 12), min(x.max(), place * 12), 60)
    right.plot(near, fit.at(np.log(near)), lw=1.3, color=colour)
    right.plot(place, fit.at(np.log(np.array(place))), marker="*" if x.min() < place < x.max() else "X", ms=9,
               color=colour, mec="white", mew=0.6, ls="")
  level_ticks(right.xaxis, rates)
  values = [s.loss.mean for s in cells.values()]
  if around := limits([v for v in values if v <= np.quantile(values, 0.9)], 0.1):
    right.set_ylim(around)
  right.set_xlabel("learning rate (★ fitted best, ✖ on the edge)")
  right.set_ylabel(loss_label(study.unit))
  right.tick_params(axis="x", rotation=35 if len(rates) > 5 else 0)
  handles = [Line2D([], [], color=colours.level(r) if colours.key == "lora.rank" else INK, marker="o", ms=4,
                    label=f"rank {r}") for r in lines]
  legend(made, handles)
  return made


def _map(made, axes, study: Study, cells: dict, ranks: list, rates: list, best: dict) -> None:
  grid = np.full((len(ranks), len(rates)), np.nan)
  for (r, lr), setting in cells.items():
    grid[ranks.index(r), rates.index(lr)] = setting.loss.mean
  finite = grid[np.isfinite(grid)]
  top = max(float(np.quantile(finite, 0.9)), float(finite.min()) + 1e-9)
  norm = matplotlib.colors.PowerNorm(0.5, finite.min(), top)  # tells the small differences near the best apart
  image = axes.imshow(grid, cmap="viridis_r", aspect="auto", origin="lower", norm=norm)
  axes.grid(False)
  axes.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates], rotation=35 if len(rates) > 5 else 0)
  axes.set_yticks(range(len(ranks)), map(str, ranks))
  axes.set_xlabel("learning rate (boxed: best of its rank)")
  axes.set_ylabel("rank")
  small = len(ranks) * len(rates) <= 64
  for i, r in enumerate(ranks):
    for j, lr in enumerate(rates):
      if np.isfinite(grid[i, j]) and small:
        dark = image.norm(grid[i, j]) > 0.45
        axes.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center", fontsize=7.5, color="white" if dark else INK)
      if best.get(r) == lr:
        axes.add_patch(matplotlib.patches.Rectangle((j - 0.46, i - 0.46), 0.92, 0.92, fill=False, ec="#d55e00", lw=1.8))
  colour_bar(made, image, axes, loss_label(study.unit))


def bars(study: Study, key: str) -> Figure | None:
  """The best setting for each level of `key`, as a point with its interval on a line; None unless it varies."""
  if len(study.levels(key)) < 2 or key not in study.keys:
    return None
  levels = best_by([s for s in study.adapted if key in s.values], key)
  if len(levels) < 2:
    return None
  order = sorted(levels.items(), key=lambda p: -p[1].loss.mean)[-MOST_BARS:]
  last, first = order[-1], order[0]
  noun = {"method": "Methods", "lora.targets": "Targets"}.get(key, word(key).capitalize())
  made, [axes] = figure(f"{noun}, each at its best: {last[1].label} has the lowest held-out loss, "
                        f"{last[1].loss.text()}, {first[1].label} the highest, {first[1].loss.text()}",
                        height=1.9 + 0.33 * len(order))
  base = study.base
  for y, (_, setting) in enumerate(order):
    e = setting.loss
    if base is not None:
      axes.plot([base, e.mean], [y, y], lw=5, color="#0072b2", alpha=0.25, solid_capstyle="butt")
    axes.errorbar(e.mean, y, xerr=e.half, fmt="o", ms=6, capsize=3, color="#0072b2")
    side = f"{setting.trainable:,} parameters" if setting.trainable else ""
    axes.annotate(side, (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                  fontsize=8, color=MUTED)
  for name, value, colour in (("base", base, FROZEN), ("full", study.full.loss.mean if study.full else None, FULL)):
    if value is not None:
      axes.axvline(value, color=colour, lw=1.1, ls="--")
      axes.annotate(name, (value, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", fontsize=8, color=MUTED)
  axes.set_yticks(range(len(order)), [s.label for _, s in order])
  axes.set_ylim(-0.6, len(order) - 0.4)
  axes.set_xlabel(loss_label(study.unit))
  return made


def parallel(study: Study) -> Figure | None:
  """A line for each setting through its values, coloured by its loss; None unless three or more vary."""
  keys = [k for k in study.keys if len(study.levels(k)) > 1][:7]
  settings = [s for s in study.adapted if all(k in s.values for k in keys)]
  if len(keys) < 3 or len(settings) < 2:
    return None
  losses = np.array([s.loss.mean for s in settings])
  best = settings[int(np.argmin(losses))]
  made, [axes] = figure(f"Of {len(settings)} settings of {_and([word(k) for k in keys])}, {best.label} has the lowest "
                        f"held-out loss, {best.loss.text()}", height=4.8)
  top = max(float(np.quantile(losses, 0.9)), float(losses.min()) + 1e-9)
  norm = matplotlib.colors.Normalize(losses.min(), top)
  colours = matplotlib.colormaps["viridis_r"]
  places = {k: {v: _even(i, len(study.levels(k))) for i, v in enumerate(study.levels(k))} for k in keys}
  span = float(losses.max() - losses.min()) or 1.0
  for i in np.argsort(-losses):
    y = [places[k][settings[i].values[k]] for k in keys] + [float((losses[i] - losses.min()) / span)]
    shift = 0.012 * ((int(i) % 5) - 2)  # lines through the same values stay apart
    is_best = settings[i] is best
    axes.plot(range(len(y)), [*(v + shift for v in y[:-1]), y[-1]],
              color="#d55e00" if is_best else colours(norm(losses[i])), lw=2.4 if is_best else 1.0,
              alpha=1.0 if is_best else 0.75, zorder=5 if is_best else 2)
  for x, k in enumerate(keys):
    axes.axvline(x, color=MUTED, lw=0.8)
    every = -(-len(places[k]) // MOST_NAMES)
    for value, place in list(places[k].items())[::every]:
      name = value if isinstance(value, str) else say(k, value).rpartition(" ")[2]
      axes.annotate(name, (x, place), (5, 0),
                    textcoords="offset points", va="center", fontsize=8, color=INK,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6})
  axes.axvline(len(keys), color=MUTED, lw=0.8)
  for fraction in (0, 0.5, 1):
    axes.annotate(f"{losses.min() + fraction * span:.3f}", (len(keys), fraction), (5, 0), textcoords="offset points",
                  va="center", fontsize=8)
  axes.set_xticks(range(len(keys) + 1), [*(word(k) for k in keys), "loss"])
  axes.set_xlim(-0.15, len(keys) + 0.35)
  axes.set_yticks([])
  axes.grid(False)
  axes.spines[["left", "bottom"]].set_visible(False)
  return made


def _even(i: int, n: int) -> float:
  return i / (n - 1) if n > 1 else 0.5


def _and(words: list[str]) -> str:
  return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else words[0]


"""A line for each setting through its values to its metric."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import say, word
from lora_exp.report.plots.style import INK, MUTED, _and, figure

MOST_NAMES = 12  # of values along one axis


def parallel(group: Group) -> Figure | None:
  """A line for each setting through its values, coloured by its metric; None unless three or more vary."""
  keys = [k for k in group.keys if len(group.levels(k)) > 1][:7]
  settings = [s for s in group.adapted if all(k in s.values for k in keys)]
  if len(keys) < 3 or len(settings) < 2:
    return None
  penalties = np.array([s.penalty for s in settings])
  values = group.metric.sign * penalties
  best = settings[int(np.argmin(penalties))]
  made, [axes] = figure(f"Of {len(settings)} settings of {_and([word(k) for k in keys])}, {best.label} has the "
                        f"{group.metric.best_word} held-out {group.metric.label}, {best.score.text()}", height=4.8)
  top = max(float(np.quantile(penalties, 0.9)), float(penalties.min()) + 1e-9)
  norm = matplotlib.colors.Normalize(penalties.min(), top)
  colours = matplotlib.colormaps["viridis_r"]
  places = {k: {v: _even(i, len(group.levels(k))) for i, v in enumerate(group.levels(k))} for k in keys}
  span = float(values.max() - values.min()) or 1.0
  for i in np.argsort(-penalties):
    y = [places[k][settings[i].values[k]] for k in keys] + [float((values[i] - values.min()) / span)]
    shift = 0.012 * ((int(i) % 5) - 2)  # lines through the same values stay apart
    is_best = settings[i] is best
    axes.plot(range(len(y)), [*(v + shift for v in y[:-1]), y[-1]],
              color="#d55e00" if is_best else colours(norm(penalties[i])), lw=2.4 if is_best else 1.0,
              alpha=1.0 if is_best else 0.75, zorder=5 if is_best else 2)
  for x, k in enumerate(keys):
    axes.axvline(x, color=MUTED, lw=0.8)
    every = -(-len(places[k]) // MOST_NAMES)
    for level, place in list(places[k].items())[::every]:
      name = level if isinstance(level, str) else say(k, level).rpartition(" ")[2]
      axes.annotate(name, (x, place), (5, 0),
                    textcoords="offset points", va="center", fontsize=8, color=INK,
                    bbox={"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.6})
  axes.axvline(len(keys), color=MUTED, lw=0.8)
  for fraction in (0, 0.5, 1):
    axes.annotate(f"{values.min() + fraction * span:.3f}", (len(keys), fraction), (5, 0), textcoords="offset points",
                  va="center", fontsize=8)
  axes.set_xticks(range(len(keys) + 1), [*(word(k) for k in keys), group.metric.label])
  axes.set_xlim(-0.15, len(keys) + 0.35)
  axes.set_yticks([])
  axes.grid(False)
  axes.spines[["left", "bottom"]].set_visible(False)
  return made


def _even(i: int, n: int) -> float:
  return i / (n - 1) if n > 1 else 0.5

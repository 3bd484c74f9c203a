"""A line for each setting through its values to its loss."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import say, word
from lora_exp.report.plots.style import INK, MUTED, _and, figure

MOST_NAMES = 12  # of values along one axis


def parallel(group: Group) -> Figure | None:
  """A line for each setting through its values, coloured by its loss; None unless three or more vary."""
  keys = [k for k in group.keys if len(group.levels(k)) > 1][:7]
  settings = [s for s in group.adapted if all(k in s.values for k in keys)]
  if len(keys) < 3 or len(settings) < 2:
    return None
  losses = np.array([s.loss.mean for s in settings])
  best = settings[int(np.argmin(losses))]
  made, [axes] = figure(f"Of {len(settings)} settings of {_and([word(k) for k in keys])}, {best.label} has the lowest "
                        f"held-out loss, {best.loss.text()}", height=4.8)
  top = max(float(np.quantile(losses, 0.9)), float(losses.min()) + 1e-9)
  norm = matplotlib.colors.Normalize(losses.min(), top)
  colours = matplotlib.colormaps["viridis_r"]
  places = {k: {v: _even(i, len(group.levels(k))) for i, v in enumerate(group.levels(k))} for k in keys}
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

"""The best setting for each value of one key, with its interval."""

from matplotlib.figure import Figure

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import word
from lora_exp.report.plots.style import FROZEN, FULL, MUTED, axis_label, figure
from lora_exp.report.verdicts.tuning import best_by

MOST_BARS = 24


def bars(group: Group, key: str) -> Figure | None:
  """The best setting for each level of `key`, as a point with its interval on a line; None unless it varies."""
  if len(group.levels(key)) < 2 or key not in group.keys:
    return None
  levels = best_by([s for s in group.adapted if key in s.values], key)
  if len(levels) < 2:
    return None
  order = sorted(levels.items(), key=lambda p: -p[1].penalty)[-MOST_BARS:]
  last, first = order[-1], order[0]
  metric = group.metric
  noun = {"method": "Methods", "lora.targets": "Targets"}.get(key, word(key).capitalize())
  made, [axes] = figure(f"{noun}, each at its best: {last[1].label} has the {metric.best_word} held-out "
                        f"{metric.label}, {last[1].score.text()}, {first[1].label} the {metric.worst_word}, "
                        f"{first[1].score.text()}",
                        height=1.9 + 0.33 * len(order))
  base = group.base
  for y, (_, setting) in enumerate(order):
    e = setting.score
    if base is not None:
      axes.plot([base, e.mean], [y, y], lw=5, color="#0072b2", alpha=0.25, solid_capstyle="butt")
    axes.errorbar(e.mean, y, xerr=e.half, fmt="o", ms=6, capsize=3, color="#0072b2")
    side = f"{setting.trainable:,} parameters" if setting.trainable else ""
    axes.annotate(side, (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
                  fontsize=8, color=MUTED)
  for name, value, colour in (("base", base, FROZEN), ("full", group.full.score.mean if group.full else None, FULL)):
    if value is not None:
      axes.axvline(value, color=colour, lw=1.1, ls="--")
      axes.annotate(name, (value, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", fontsize=8, color=MUTED)
  axes.set_yticks(range(len(order)), [s.label for _, s in order])
  axes.set_ylim(-0.6, len(order) - 0.4)
  axes.set_xlabel(axis_label(group))
  return made

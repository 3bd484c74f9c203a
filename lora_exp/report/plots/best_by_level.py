"""The best setting for each value of one key, with its interval and the reference lines."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import METHOD, TARGETS, short_name
from lora_exp.report.plots.colours import FROZEN, FULL, MUTED, PALETTE
from lora_exp.report.plots.style import axis_label, figure
from lora_exp.report.verdicts.tuning import best_by

MOST_LEVELS = 24
NOUNS = {METHOD: "Methods", TARGETS: "Targets"}


def best_by_level(group: Group, key: str) -> Figure | None:
  """One row per value of `key`, the best on top; None unless `key` varies."""
  if key not in group.keys or len(group.levels(key)) < 2:
    return None
  levels = best_by([s for s in group.adapted if key in s.values], key)
  if len(levels) < 2:
    return None
  settings = sorted(levels.values(), key=penalty, reverse=True)[-MOST_LEVELS:]
  worst, best, metric = settings[0], settings[-1], group.metric
  noun = NOUNS.get(key, short_name(key).capitalize())
  fig, [axes] = figure(f"{noun}, each at its best: {best.label} has the {metric.best_word} held-out {metric.label}, "
                       f"{best.score.text()}, {worst.label} the {metric.worst_word}, {worst.score.text()}",
                       height=1.9 + 0.33 * len(settings))
  for y, setting in enumerate(settings):
    _draw_setting(axes, y, setting, group.base)
  full = group.full.score.mean if group.full else None
  for name, score, colour in (("base", group.base, FROZEN), ("full", full, FULL)):
    if score is not None:
      axes.axvline(score, color=colour, lw=1.1, ls="--")
      axes.annotate(name, (score, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    ha="center", fontsize=8, color=MUTED)
  axes.set_yticks(range(len(settings)), [s.label for s in settings])
  axes.set_ylim(-0.6, len(settings) - 0.4)
  axes.set_xlabel(axis_label(group))
  return fig


def _draw_setting(axes: Axes, y: int, setting: Setting, base: float | None) -> None:
  """Draws the score with its interval, a bar for the gain over the base, and the parameters on the right."""
  score = setting.score
  if base is not None:
    axes.plot([base, score.mean], [y, y], lw=5, color=PALETTE[0], alpha=0.25, solid_capstyle="butt")
  axes.errorbar(score.mean, y, xerr=score.half, fmt="o", ms=6, capsize=3, color=PALETTE[0])
  parameters = f"{setting.trainable:,} parameters" if setting.trainable else ""
  axes.annotate(parameters, (1, y), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center", fontsize=8, color=MUTED)

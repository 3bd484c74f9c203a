"""The best setting for each value of one key, with its interval and the reference lines."""

import altair as alt

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import penalty
from lora_exp.report.grouping.setting_keys import METHOD, TARGETS, short_name
from lora_exp.report.plots.axes import axis_label, limits, linear
from lora_exp.report.plots.colours import FROZEN, MUTED, PALETTE
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.plots.setting_marks import (
  FULL_NAME,
  NOT_JUDGED,
  note,
  points,
  setting_row,
  state_entries,
  tooltips,
  verdict_scales,
)
from lora_exp.report.verdicts.states import States
from lora_exp.report.verdicts.tuning import best_by

MOST_LEVELS = 24
ROW = 40  # pixels of height
NOUNS = {METHOD: "Methods", TARGETS: "Targets"}


def best_by_level(group: Group, key: str, states: States) -> Figure | None:
  """A row for each value of `key`, the best at the top; None unless `key` varies."""
  if key not in group.keys or len(group.levels(key)) < 2:
    return None
  levels = best_by([s for s in group.adapted if key in s.values], key)
  if len(levels) < 2:
    return None
  settings = sorted(levels.values(), key=penalty)[:MOST_LEVELS]
  best, worst, metric = settings[0], settings[-1], group.metric
  full = group.full.score.mean if group.full else None
  ends = [end for s in settings for end in (s.score.low, s.score.high)]
  x = alt.X(**linear("y", axis_label(group), limits([*ends, *(v for v in (group.base, full) if v is not None)], 0.06)))
  y = alt.Y("setting:N", sort=None, axis=None)
  rows = [setting_row(group, s, 0.0, s.score, states.get(s.label, NOT_JUDGED))
          | {"base": s.score.mean if group.base is None else group.base,
             "label": f"{s.label}: {s.trainable or 0:,} parameters"}
          for s in settings]
  data = chart(rows)
  layers = [
    data.mark_rule(color=PALETTE[0], strokeOpacity=0.18, strokeWidth=7).encode(x=x, x2="base:Q", y=y),
    data.mark_rule(color=MUTED).encode(x=alt.X("y_low:Q"), x2="y_high:Q", y=y),
    *_reference_lines({"base": group.base, FULL_NAME: full}),
    data.mark_text(align="left", baseline="bottom", dy=-8, dx=2, limit=alt.ExprRef("width - 4")).encode(
      x=alt.value(0), y=y, text="label:N"),
    points(rows, x, y, *verdict_scales(rows), tooltips(group, judged=bool(states))),
  ]
  noun = NOUNS.get(key, short_name(key).capitalize())
  title = (f"{noun}, each at its best: {best.label} has the {metric.best_word} held-out {metric.label}, "
           f"{best.score.text()}, {worst.label} the {metric.worst_word}, {worst.score.text()}")
  return Figure(title, (layered(layers, ROW * len(settings) + 16),), note(rows), state_entries(rows))


def _reference_lines(lines: dict[str, float | None]) -> list[alt.Chart]:
  """Dashed vertical lines, their names above the panel."""
  rows = [{"name": name, "y": value} for name, value in lines.items() if value is not None]
  if not rows:
    return []
  data = chart(rows).encode(x=alt.X("y:Q"))
  return [data.mark_rule(strokeDash=[6, 4], color=FROZEN),
          data.mark_text(color=MUTED, baseline="bottom", dy=-3).encode(y=alt.value(0), text="name:N")]

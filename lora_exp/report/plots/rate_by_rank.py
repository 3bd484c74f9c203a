"""Learning rate × rank: the metric as a map, and as a curve for each rank."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from lora_exp.report.estimation.fits import fit_parabola
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK, RATE
from lora_exp.report.plots.axes import and_list, axis_label, level_axis, limits, linear, title_lines
from lora_exp.report.plots.colours import BEST, LINES, VIRIDIS, viridis
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.plots.setting_marks import Row, diverged_marks, setting_row, tooltips
from lora_exp.report.verdicts.tuning import best_of

Grid = dict[int, dict[float, Setting]]  # rank -> learning rate -> the best setting
MOST_CELLS = 48  # up to which each has its score written in it
STAR = "M0,-1L0.23,-0.31L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.23,-0.31Z"


def rate_by_rank(group: Group) -> Figure | None:
  """The map and the curves; None unless both the rank and the rate vary among the scored trials."""
  rates = sorted({s.values[RATE] for s in group.adapted if RATE in s.values})
  grid = _grid(group, rates)
  if len(grid) < 2 or len(rates) < 2:
    return None
  best = {rank: best_of(by_rate.values()).values[RATE] for rank, by_rate in grid.items()}
  rows = [setting_row(group, s, rate, s.score) | {"rank": rank, "rate": f"{rate:g}", "best": rate == best[rank]}
          for rank, by_rate in grid.items() for rate, s in by_rate.items()]
  return Figure(_title(best, rates), (_map(group, rows, rates), _curves(group, grid, rows, rates)),
                entries=tuple(f"rank {rank}" for rank in grid))


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


def _map(group: Group, rows: Sequence[Row], rates: Sequence[float]) -> alt.LayerChart:
  """The scores as colours; the best rate of each rank has a frame."""
  scores = np.array([row["y"] for row in rows])
  if group.metric.higher_is_better:  # most of the colours are for the small differences near the best
    low, high, colours = float(np.quantile(scores, 0.1)), float(scores.max()), VIRIDIS
  else:
    low, high, colours = float(scores.min()), float(np.quantile(scores, 0.9)), VIRIDIS[::-1]
  high = max(high, low + 1e-9)
  ranks = group.levels(RANK)
  x_title = title_lines("learning rate (framed: best of its rank)")
  data = chart(rows).encode(
    x=alt.X("rate:N", sort=[f"{rate:g}" for rate in rates], title=x_title,
            axis=alt.Axis(labelAngle=0 if len(rates) <= 6 else -40)),
    y=alt.Y("rank:O", sort=ranks[::-1], title="rank"))
  colour = alt.Color("y:Q", scale=alt.Scale(domain=(low, high), range=list(colours), clamp=True),
                     legend=alt.Legend(title=axis_label(group), gradientLength=220, format=".3f"))
  layers = [data.mark_rect().encode(color=colour, tooltip=tooltips(group))]
  if len(rows) <= MOST_CELLS:
    middle = (low + high) / 2
    dark = f"datum.y {'<' if group.metric.higher_is_better else '>'} {middle}"
    layers.append(data.mark_text(fontSize=11, color=alt.ExprRef(f"{dark} ? 'white' : '#111'"),
                                 opacity=alt.ExprRef("width < 200 ? 0 : 1")).encode(text=alt.Text("y:Q", format=".3f")))
  framed = data.transform_filter("datum.best").mark_rect(fillOpacity=0, stroke=BEST, strokeWidth=2.5)
  return layered([*layers, framed])


def _curves(group: Group, grid: Grid, rows: Sequence[Row], rates: Sequence[float]) -> alt.LayerChart:
  """The scores of each rank with their intervals; a star at the minimum of a parabola that is interior."""
  penalties = [s.penalty for by_rate in grid.values() for s in by_rate.values()]
  worst = float(np.quantile(penalties, 0.9))  # a rate that is far too high would flatten the other curves
  around = limits([group.metric.sign * p for p in penalties if p <= worst], 0.1)
  x = alt.X(**level_axis("x", "learning rate (★ fitted minimum)", rates))
  y = alt.Y(**linear("y", axis_label(group), around))
  names = {rank: f"rank {rank}" for rank in grid}
  range_ = [viridis(LINES * i / max(1, len(grid) - 1)) for i in range(len(grid))]
  color = alt.Color("name:N", scale=alt.Scale(domain=list(names.values()), range=range_), legend=alt.Legend(title=None))
  values = [row | {"name": names[row["rank"]]} for row in rows]
  data = chart(values).encode(color=color)
  layers = [
    data.mark_line(clip=True, strokeWidth=1.5).encode(x=x, y=y),
    data.mark_rule(clip=True).encode(x=x, y=alt.Y("y_low:Q"), y2="y_high:Q"),
    data.mark_point(clip=True, filled=True, size=45, opacity=1).encode(x=x, y=y, tooltip=tooltips(group)),
  ]
  stars = [fitted | {"name": names[rank]} for rank, by_rate in grid.items() for fitted in _minimum(group, by_rate)]
  if stars:
    tips = [alt.Tooltip("name:N", title="rank"), alt.Tooltip("rate:N", title="fitted")]
    star = chart(stars).mark_point(shape=STAR, filled=True, size=130, opacity=1, stroke="white", strokeWidth=0.7,
                                   clip=True)
    layers.append(star.encode(x=x, y=y, color=color, tooltip=tips))
  tried = [s for s in group.settings if s.values.get(RATE) is not None and not s.method.is_reference]
  layers += diverged_marks(group, tried, [s.values[RATE] for s in tried], x)
  return layered(layers)


def _minimum(group: Group, by_rate: dict[float, Setting]) -> list[dict[str, Any]]:
  """The vertex of the parabola in log rate, if there is one between the rates that were tried."""
  fit = fit_parabola([float(np.log(rate)) for rate in by_rate], [s.penalty for s in by_rate.values()])
  if fit is None or not min(by_rate) < np.exp(fit.vertex) < max(by_rate):
    return []
  rate = float(np.exp(fit.vertex))
  return [{"x": rate, "y": group.metric.sign * fit.minimum, "rate": f"{rate:.2g}"}]

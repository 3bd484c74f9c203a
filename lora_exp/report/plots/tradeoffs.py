"""The held-out metric against what it costs: parameters, forgetting, time, FLOPs, memory."""

from collections.abc import Callable, Sequence

import altair as alt

from lora_exp.report.estimation.estimates import Estimate
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.plots.axes import axis_label, limits, linear, logarithmic, loss_label
from lora_exp.report.plots.colours import FROZEN, MUTED, evenly_picked
from lora_exp.report.plots.counts import short_count
from lora_exp.report.plots.figure import HEIGHT, Figure, chart, layered
from lora_exp.report.plots.point_labels import name_points
from lora_exp.report.plots.setting_marks import (
  FULL_NAME,
  NOT_JUDGED,
  diverged_marks,
  intervals,
  legend_entries,
  note,
  points,
  reference_lines,
  setting_row,
  state_entries,
  tooltips,
  value_scales,
  verdict_scales,
)
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.verdicts.states import States
from lora_exp.report.verdicts.verdict import shown_front

MOST_LABELS = 8  # on the front; the pointer names the others
MOST_LABELLED = 10  # settings of a plot in which each has a label
MIB = 2**20


def pareto(group: Group, states: States) -> Figure | None:
  """The held-out metric against trainable parameters, with the Pareto front and the reference lines."""
  settings = [s for s in group.adapted if s.trainable]
  if not settings:
    return None
  costs = [_parameters(s) for s in settings]
  front = shown_front(_best_by_cost(settings))
  lines = {"base": group.base, FULL_NAME: group.full.score.mean if group.full else None}
  bounds = [*_bounds(settings), *(value for value in lines.values() if value is not None)]
  x = logarithmic("x", "trainable parameters", costs)
  y = linear("y", axis_label(group), limits(bounds, 0.12))
  rows = [setting_row(group, s, cost, s.score, states.get(s.label, NOT_JUDGED))
          for s, cost in zip(settings, costs, strict=True)]
  layers = [*reference_lines(lines), *_front(front, x, y), *intervals(rows, alt.X(**x), alt.Y(**y)),
            points(rows, alt.X(**x), alt.Y(**y), *verdict_scales(rows), tooltips(group, judged=bool(states)))]
  unfinished = [s for s in group.settings if s.trainable and not s.method.is_reference]
  layers += diverged_marks(group, unfinished, [_parameters(s) for s in unfinished], alt.X(**x))
  others = [s for s in settings if s not in front] if len(settings) <= MOST_LABELLED else []
  named = [*evenly_picked(front, MOST_LABELS), *others]
  layers += name_points([(_parameters(s), s.score.mean, s.label) for s in named],
                        x, y, [(_parameters(s), s.score.mean) for s in settings if s not in named], lines)
  return Figure(_pareto_title(front, settings), (layered(layers),), note(rows, diverged=True), state_entries(rows))


def _best_by_cost(settings: Sequence[Setting]) -> list[Setting]:
  """The best of the settings with equally many parameters."""
  best: dict[float, Setting] = {}
  for setting in sorted(settings, key=penalty, reverse=True):
    best[_parameters(setting)] = setting
  return list(best.values())


def _front(front: Sequence[Setting], x: dict, y: dict) -> list[alt.Chart]:
  """Steps through the front: no setting lies below and left of them."""
  if len(front) < 2:
    return []
  rows = [{"x": _parameters(s), "y": s.score.mean} for s in front]
  return [chart(rows).mark_line(interpolate="step-after", color=MUTED, strokeWidth=1.2)
          .encode(x=alt.X(**x), y=alt.Y(**y))]


def _pareto_title(front: Sequence[Setting], settings: Sequence[Setting]) -> str:
  """The ends of the front; where it has one setting, the best of all that were tried."""
  metric = settings[0].metric
  if len(front) < 2:
    best = min(settings, key=penalty)
    title = (f"The {metric.best_word} held-out {metric.label} is {best.score.text()}, of {best.label}, with "
             f"{_count(best)} trainable parameters")
    if len(settings) == 1 or not front:
      return title
    return f"{title}; no setting is shown to be better than {front[0].label}, with {_count(front[0])}, the fewest"
  first, last = front[0], front[-1]
  moves = "rises" if metric.higher_is_better else "falls"
  return (f"On the Pareto front the held-out {metric.label} {moves} from {first.score.text()} with {_count(first)} "
          f"trainable parameters ({first.label}) to {last.score.text()} with {_count(last)} ({last.label})")


def forgetting(group: Group) -> Figure | None:
  """Rise of the loss on the retained text against the gain; None without a retained text."""
  settings = [s for s in [*group.adapted, *([group.full] if group.full else [])]
              if s.estimate(_forgetting).n and s.gain.n]
  if not settings:
    return None
  rises, gains = [s.estimate(_forgetting) for s in settings], [s.gain for s in settings]
  side = group.metric.better_side
  most, rise = max(zip(settings, rises, strict=True), key=_gain)
  x = linear("x", axis_label(group, f"learning: gain {side} the base, held out"), limits(_ends(gains), 0.1))
  y = linear("y", loss_label(group, "forgetting: rise on the retained text"), limits([0.0, *_ends(rises)], 0.12))
  rows = [setting_row(group, s, gain, e) | {"rise": e.text(sign=True)}
          for s, gain, e in zip(settings, gains, rises, strict=True)]
  tips = [*tooltips(group), alt.Tooltip("rise:N", title="forgetting")]
  layers = [chart([{"y": 0}]).mark_rule(color=FROZEN).encode(y="y:Q"),
            *intervals(rows, alt.X(**x), alt.Y(**y)),
            points(rows, alt.X(**x), alt.Y(**y), *value_scales(group, settings), tips)]
  if len(settings) <= MOST_LABELLED + 4:
    layers += name_points([(g.mean, e.mean, s.label) for s, g, e in zip(settings, gains, rises, strict=True)], x, y)
  title = (f"The largest mean gain is that of {most.label}, {most.gain.text()} {side} the base; its loss on the "
           f"retained text changes by {rise.text(sign=True)}")
  return Figure(title, (layered(layers),), note(rows), legend_entries(group))


def cost(group: Group) -> Figure | None:
  """The held-out metric against training time, FLOPs and memory, a panel for each that was measured."""
  settings = [*group.adapted, *([group.full] if group.full else [])]
  measures: list[tuple[str, Callable[[RunRecord], float | None]]] = [
    ("training time (s)", _seconds), ("training FLOPs", _flops), ("memory of a step (MiB)", _memory)]
  measured = [(name, measure) for name, measure in measures if any(_is_positive(s.estimate(measure)) for s in settings)]
  if not measured or len(settings) < 2:
    return None
  panels = [_cost_panel(group, settings, name, measure, legend=i == 0) for i, (name, measure) in enumerate(measured)]
  best = min(settings, key=penalty)
  seconds = best.estimate(_seconds)
  values = "losses" if group.metric.name == "loss" else f"values of {group.metric.label}"
  took = f"{seconds.mean:.1f} s" if seconds.n else "no known time"
  return Figure(f"What the {values} cost: the {group.metric.best_word}, of {best.label}, took {took} of training",
                tuple(panels), entries=legend_entries(group))


def _cost_panel(group: Group, settings: Sequence[Setting], name: str, measure: Callable[[RunRecord], float | None],
                legend: bool) -> alt.LayerChart:
  shown = [s for s in settings if _is_positive(s.estimate(measure))]
  costs = [s.estimate(measure) for s in shown]
  x = logarithmic("x", name, [e.mean for e in costs], room=1.25)
  y = linear("y", axis_label(group), limits(_bounds(shown)))
  rows = [setting_row(group, s, e, s.score) | {"cost": short_count(e.mean) if e.mean >= 1000 else f"{e.mean:.3g}"}
          for s, e in zip(shown, costs, strict=True)]
  tips = [*tooltips(group), alt.Tooltip("cost:N", title=name)]
  layers = [*intervals(rows, alt.X(**x), alt.Y(**y)),
            points(rows, alt.X(**x), alt.Y(**y), *value_scales(group, shown, legend), tips)]
  return layered(layers, HEIGHT - 60)


def _seconds(run: RunRecord) -> float | None:
  return run.number_at("seconds", "train")


def _flops(run: RunRecord) -> float | None:
  per_token, tokens = run.number_at("flops_per_token"), run.number_at("tokens")
  return None if per_token is None or tokens is None else per_token * tokens


def _memory(run: RunRecord) -> float | None:
  """MiB."""
  peak = run.number_at("peak_memory_bytes")
  return None if peak is None else peak / MIB


def _forgetting(run: RunRecord) -> float | None:
  return run.forgetting


def _bounds(settings: Sequence[Setting]) -> list[float]:
  return _ends([s.score for s in settings])


def _ends(estimates: Sequence[Estimate]) -> list[float]:
  return [end for e in estimates for end in (e.low, e.high)]


def _is_positive(e: Estimate) -> bool:
  return e.n > 0 and e.mean > 0


def _gain(pair: tuple[Setting, Estimate]) -> float:
  return pair[0].gain.mean


def _parameters(setting: Setting) -> float:
  return float(setting.trainable or 0)


def _count(setting: Setting) -> str:
  return short_count(setting.trainable or 0)

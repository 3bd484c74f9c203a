"""The held-out metric against what it costs: parameters, forgetting, time, FLOPs, memory."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import say
from lora_exp.report.plots.run_plots import _short
from lora_exp.report.plots.style import (
  FROZEN,
  FULL,
  MUTED,
  Colours,
  axis_label,
  few,
  figure,
  legend,
  limits,
  log_axis,
  loss_label,
  markers,
  name_points,
  second_key,
)
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.statistics.estimates import Estimate
from lora_exp.report.statistics.fits import front

MOST_LABELS = 8  # on the front; the colours tell the rest


def pareto(group: Group) -> Figure | None:
  """The held-out metric against trainable parameters, with the front and the reference lines."""
  settings = [s for s in group.adapted if s.trainable]
  if not settings:
    return None
  costs = [float(s.trainable or 0) for s in settings]
  best = [settings[i] for i in front(list(zip(costs, [s.penalty for s in settings], strict=True)))]
  first, last, metric = best[0], best[-1], group.metric
  moves = "rises" if metric.higher_is_better else "falls"
  if first is last:
    title = (f"The {metric.best_word} held-out {metric.label} is {first.score.text()}, of {first.label}, with "
             f"{_count(first)} trainable parameters{', the fewest' if len(settings) > 1 else ''}")
  else:
    title = (f"On the Pareto front the held-out {metric.label} {moves} from {first.score.text()} with "
             f"{_count(first)} trainable parameters ({first.label}) to {last.score.text()} with "
             f"{_count(last)} ({last.label})")
  made, [axes] = figure(title)
  _points(axes, group, settings, costs, lambda s: s.score)
  _front_line(axes, [(float(s.trainable or 0), s.score.mean) for s in best])
  log_axis(axes.xaxis, costs)
  values = [v for s in settings for v in (s.score.low, s.score.high)]
  lines = [("base", group.base, FROZEN)] if group.base is not None else []
  lines += [("full fine-tuning", group.full.score.mean, FULL)] if group.full else []
  if found := limits([*values, *(y for _, y, _ in lines)], 0.12):
    axes.set_ylim(found)
  _lines(axes, lines)
  axes.set_xlabel("trainable parameters")
  axes.set_ylabel(axis_label(group))
  name_points(axes, [(float(s.trainable or 0), s.score.mean, _brief(s)) for s in few(best, MOST_LABELS)]
              + [(c, s.score.mean, _brief(s)) for s, c in zip(settings, costs, strict=True)
                 if s not in best and len(settings) <= 10])
  _legend(made, group)
  return made


def share(group: Group) -> Figure | None:
  """Share of full fine-tuning's gain against trainable parameters; None without a full trial."""
  found = [(s, group.share(s)) for s in group.adapted if s.trainable]
  found = [(s, e) for s, e in found if e.n]
  if not found or group.full is None:
    return None
  best, estimate = max(found, key=lambda p: p[1].mean)
  of = (best.trainable or 0) / (group.full.trainable or math.nan)
  made, [axes] = figure(f"Of the gain of full fine-tuning, {best.label} recovers {estimate.text(1, factor=100)} %, "
                        f"with {of * 100:.3g} % of its parameters")
  costs = [float(s.trainable or 0) for s, _ in found]
  table = {id(s): Estimate(e.mean * 100, e.half and e.half * 100, e.n) for s, e in found}
  _points(axes, group, [s for s, _ in found], costs, lambda s: table[id(s)])
  log_axis(axes.xaxis, costs)
  if around := limits([0, 100, *(v for e in table.values() for v in (e.low, e.high))], 0.05):
    axes.set_ylim(max(around[0], min(0, min(e.mean for e in table.values())) - 12), around[1])
  _lines(axes, [("full fine-tuning = 100 %", 100, FULL), ("base = 0 %", 0, FROZEN)])
  axes.set_xlabel("trainable parameters")
  axes.set_ylabel("share of full fine-tuning's gain (%)")
  if len(found) <= 10:
    name_points(axes, [(c, table[id(s)].mean, _brief(s)) for (s, _), c in zip(found, costs, strict=True)])
  _legend(made, group)
  return made


def forgetting(group: Group) -> Figure | None:
  """Rise of the loss on `retain` against the gain; None without it."""
  cost = lambda s: s.of(lambda trial: trial.number_at("losses", "forgetting"))
  settings = [s for s in [*group.adapted, *([group.full] if group.full else [])] if cost(s).n and s.gain.n]
  if not settings:
    return None
  most = max(settings, key=lambda s: s.gain.mean)
  side = group.metric.better_side
  made, [axes] = figure(f"The most is learned by {most.label}, {most.gain.text()} {side} the base; its loss on the "
                        f"retained text changes by {cost(most).text(sign=True)}")
  _points(axes, group, settings, [s.gain.mean for s in settings], cost, across=lambda s: s.gain)
  axes.axhline(0, color=FROZEN, lw=1)
  axes.set_xlabel(axis_label(group, f"learning: gain {side} the base, held out"))
  axes.set_ylabel(loss_label(group, "forgetting: rise on the retained text"))
  if len(settings) <= 14:
    name_points(axes, [(s.gain.mean, cost(s).mean, _brief(s)) for s in settings])
  _legend(made, group)
  return made


def cost(group: Group) -> Figure | None:
  """Time, FLOPs and memory against the held-out metric, a panel each; what was not measured has none."""
  settings = [*group.adapted, *([group.full] if group.full else [])]
  panels: list[tuple[str, Callable[[RunRecord], float | None]]] = [
    ("training time (s)", lambda trial: trial.number_at("seconds", "train")),
    ("training FLOPs", _flops),
    ("memory of a step (MiB)", lambda trial: _times(trial.number_at("peak_memory_bytes"), 2**-20)),
  ]
  panels = [(name, value) for name, value in panels if any(_positive(s, value) for s in settings)]
  if not panels or len(settings) < 2:
    return None
  low = min(settings, key=lambda s: s.penalty)
  words = [f"{s.text(1)} s" for s in [low.of(lambda trial: trial.number_at("seconds", "train"))] if s.n]
  values = "losses" if group.metric.name == "loss" else f"values of {group.metric.label}"
  took = words[0] if words else "no known time"
  made, axes = figure(f"What the {values} cost: the {group.metric.best_word}, of {low.label}, took {took} of training",
                      panels=len(panels), height=3.9)
  for ax, (name, value) in zip(axes, panels, strict=True):
    shown = [s for s in settings if _positive(s, value)]
    costs = [s.of(value).mean for s in shown]
    _points(ax, group, shown, costs, lambda s: s.score, across=partial(Setting.of, value=value))
    log_axis(ax.xaxis, costs)
    if len(costs) > 1 and ax.get_xscale() == "log":
      ax.set_xlim(min(costs) / 1.25, max(costs) * 1.25)
    ax.set_xlabel(name)
    if found := limits([v for s in shown for v in (s.score.low, s.score.high)]):
      ax.set_ylim(found)
  axes[0].set_ylabel(axis_label(group))
  for ax in axes[1:]:
    ax.tick_params(labelleft=False)
  _legend(made, group, full=group.full is not None)
  return made


def _flops(trial: RunRecord) -> float | None:
  return _times(trial.number_at("flops_per_token"), trial.number_at("tokens"))


def _times(a: float | None, b: float | None) -> float | None:
  return None if a is None or b is None else a * b


def _positive(setting: Setting, value: Callable[[RunRecord], float | None]) -> bool:
  found = setting.of(value)
  return found.n > 0 and found.mean > 0


def _points(axes: Axes, group: Group, settings: Sequence[Setting], costs: Sequence[float],
            value: Callable[[Setting], Estimate], across: Callable[[Setting], Estimate] | None = None) -> None:
  """Means with their intervals."""
  colours = Colours(group)
  shapes, second = markers(group, colours), second_key(group, colours)
  for setting, place in zip(settings, costs, strict=True):
    e = value(setting)
    wide = across(setting).half if across else None
    shape = "s" if setting.reference else shapes.get(setting.values.get(second or ""), "o")
    axes.errorbar(place, e.mean, yerr=e.half, xerr=wide, fmt=shape, ms=6, lw=1, capsize=2.5, zorder=3,
                  color=colours.of(setting), ecolor=(*to_rgb(colours.of(setting)), 0.55), mec="white", mew=0.6)


def _front_line(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
  """The front as steps: below and left of it there is no setting."""
  if len(points) > 1:
    x, y = np.array(points).T
    axes.step(x, y, where="post", color=MUTED, lw=1.2, zorder=1)


def _lines(axes: Axes, lines: Sequence[tuple[str, float, str]]) -> None:
  for name, y, colour in lines:
    axes.axhline(y, color=colour, lw=1.1, ls="--", zorder=1)
    axes.annotate(name, (1, y), (-2, 2.5), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  fontsize=8, color=MUTED)


def _legend(made: Figure, group: Group, full: bool = False) -> None:
  colours = Colours(group)
  handles = colours.handles()
  second = second_key(group, colours)
  handles += [Line2D([], [], marker=m, ls="", color=MUTED, label=say(second or "", v))
              for v, m in markers(group, colours).items()]
  if full:
    handles.append(Line2D([], [], marker="s", ls="", color=FULL, label="full"))
  legend(made, handles)


def _count(setting: Setting) -> str:
  return _short(setting.trainable or 0)


def _brief(setting: Setting) -> str:
  return setting.label if len(setting.label) <= 34 else setting.label[:33] + "…"

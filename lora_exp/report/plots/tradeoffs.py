"""The held-out metric against its costs: parameters, forgetting, time, FLOPs, memory."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import key_value
from lora_exp.report.plots.colours import FROZEN, FULL, MUTED, Colours, evenly_picked, marker_key, markers
from lora_exp.report.plots.run_plots import short_count
from lora_exp.report.plots.style import axis_label, figure, legend, limits, log_axis, loss_label, name_points
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.statistics.estimates import Estimate
from lora_exp.report.statistics.fits import pareto_front

MOST_LABELS = 8  # maximum number of labels on the front; colours show the rest
MOST_LABELLED = 10  # up to this number of settings, each one is labelled
MIB = 2**20


def pareto(group: Group) -> Figure | None:
  """The held-out metric against trainable parameters, with the Pareto front and the reference lines."""
  settings = [s for s in group.adapted if s.trainable]
  if not settings:
    return None
  costs = [_parameters(s) for s in settings]
  front = [settings[i] for i in pareto_front([(x, s.penalty) for x, s in zip(costs, settings, strict=True)])]
  fig, [axes] = figure(_pareto_title(front, alone=len(settings) == 1))
  _draw_points(axes, group, settings, [s.score for s in settings], [_exact(x) for x in costs])
  if len(front) > 1:  # no setting lies below and left of the steps
    axes.step([_parameters(s) for s in front], [s.score.mean for s in front], where="post", color=MUTED, lw=1.2,
              zorder=1)
  log_axis(axes.xaxis, costs)
  lines = [("base", group.base, FROZEN)] if group.base is not None else []
  lines += [("full fine-tuning", group.full.score.mean, FULL)] if group.full else []
  bounds = [bound for s in settings for bound in (s.score.low, s.score.high)]
  if around := limits([*bounds, *(y for _, y, _ in lines)], 0.12):
    axes.set_ylim(around)
  _draw_lines(axes, lines)
  axes.set_xlabel("trainable parameters")
  axes.set_ylabel(axis_label(group))
  others = [s for s in settings if s not in front] if len(settings) <= MOST_LABELLED else []
  labelled = [*evenly_picked(front, MOST_LABELS), *others]
  name_points(axes, [(_parameters(s), s.score.mean, _short_label(s)) for s in labelled])
  _draw_legend(fig, group)
  return fig


def _pareto_title(front: Sequence[Setting], alone: bool) -> str:
  """`alone`: there is one setting."""
  first, last, metric = front[0], front[-1], front[0].metric
  if first is last:
    return (f"The {metric.best_word} held-out {metric.label} is {first.score.text()}, of {first.label}, with "
            f"{_count(first)} trainable parameters{'' if alone else ', the fewest'}")
  moves = "rises" if metric.higher_is_better else "falls"
  return (f"On the Pareto front the held-out {metric.label} {moves} from {first.score.text()} with {_count(first)} "
          f"trainable parameters ({first.label}) to {last.score.text()} with {_count(last)} ({last.label})")


def share_of_full(group: Group) -> Figure | None:
  """Share of full fine-tuning's gain against trainable parameters; None without full fine-tuning."""
  shares = [(s, group.share(s)) for s in group.adapted if s.trainable]
  shares = [(s, _percent(share)) for s, share in shares if share.n]
  if not shares or group.full is None:
    return None
  settings = [s for s, _ in shares]
  percents = [percent for _, percent in shares]
  best, percent = max(shares, key=_mean)
  size = (best.trainable or 0) / (group.full.trainable or math.nan)
  fig, [axes] = figure(f"Of the gain of full fine-tuning, {best.label} recovers {percent.text(1)} %, with "
                       f"{size * 100:.3g} % of its parameters")
  costs = [_parameters(s) for s in settings]
  _draw_points(axes, group, settings, percents, [_exact(x) for x in costs])
  log_axis(axes.xaxis, costs)
  if around := limits([0, 100, *(bound for e in percents for bound in (e.low, e.high))], 0.05):
    axes.set_ylim(max(around[0], min(0, min(e.mean for e in percents)) - 12), around[1])
  _draw_lines(axes, [("full fine-tuning = 100 %", 100, FULL), ("base = 0 %", 0, FROZEN)])
  axes.set_xlabel("trainable parameters")
  axes.set_ylabel("share of full fine-tuning's gain (%)")
  if len(settings) <= MOST_LABELLED:
    name_points(axes, [(x, e.mean, _short_label(s)) for s, e, x in zip(settings, percents, costs, strict=True)])
  _draw_legend(fig, group)
  return fig


def forgetting(group: Group) -> Figure | None:
  """Rise of the loss on the retained text against the gain; None without a retained text."""
  settings = [s for s in [*group.adapted, *([group.full] if group.full else [])]
              if s.estimate(_forgetting).n and s.gain.n]
  if not settings:
    return None
  rises = [s.estimate(_forgetting) for s in settings]
  side = group.metric.better_side
  most, rise = max(zip(settings, rises, strict=True), key=_gain)
  fig, [axes] = figure(f"The most is learned by {most.label}, {most.gain.text()} {side} the base; its loss on "
                       f"the retained text changes by {rise.text(sign=True)}")
  _draw_points(axes, group, settings, rises, [s.gain for s in settings])
  axes.axhline(0, color=FROZEN, lw=1)
  axes.set_xlabel(axis_label(group, f"learning: gain {side} the base, held out"))
  axes.set_ylabel(loss_label(group, "forgetting: rise on the retained text"))
  if len(settings) <= 14:
    name_points(axes, [(s.gain.mean, e.mean, _short_label(s)) for s, e in zip(settings, rises, strict=True)])
  _draw_legend(fig, group)
  return fig


def cost(group: Group) -> Figure | None:
  """The held-out metric against training time, FLOPs and memory, a panel for each that was measured."""
  settings = [*group.adapted, *([group.full] if group.full else [])]
  measures: list[tuple[str, Callable[[RunRecord], float | None]]] = [
    ("training time (s)", _seconds), ("training FLOPs", _flops), ("memory of a step (MiB)", _memory)]
  panels = [(name, measure) for name, measure in measures if any(_is_positive(s.estimate(measure)) for s in settings)]
  if not panels or len(settings) < 2:
    return None
  best = min(settings, key=penalty)
  seconds = best.estimate(_seconds)
  values = "losses" if group.metric.name == "loss" else f"values of {group.metric.label}"
  took = f"{seconds.text(1)} s" if seconds.n else "no known time"
  fig, axes = figure(f"What the {values} cost: the {group.metric.best_word}, of {best.label}, took {took} of training",
                     panels=len(panels), height=3.9)
  for ax, (name, measure) in zip(axes, panels, strict=True):
    shown = [s for s in settings if _is_positive(s.estimate(measure))]
    costs = [s.estimate(measure) for s in shown]
    means = [e.mean for e in costs]
    _draw_points(ax, group, shown, [s.score for s in shown], costs)
    log_axis(ax.xaxis, means)
    if len(means) > 1 and ax.get_xscale() == "log":
      ax.set_xlim(min(means) / 1.25, max(means) * 1.25)
    ax.set_xlabel(name)
    if around := limits([bound for s in shown for bound in (s.score.low, s.score.high)]):
      ax.set_ylim(around)
  axes[0].set_ylabel(axis_label(group))
  for ax in axes[1:]:
    ax.tick_params(labelleft=False)
  _draw_legend(fig, group, full=group.full is not None)
  return fig


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


def _draw_points(axes: Axes, group: Group, settings: Sequence[Setting], ys: Sequence[Estimate],
                 xs: Sequence[Estimate]) -> None:
  """A marker for each setting, with the intervals of y and x."""
  colours = Colours(group)
  shapes, key = markers(group, colours), marker_key(group, colours)
  for setting, x, y in zip(settings, xs, ys, strict=True):
    shape = "s" if setting.method.is_reference else shapes.get(setting.values.get(key or ""), "o")
    colour = colours.of(setting)
    axes.errorbar(x.mean, y.mean, yerr=y.half, xerr=x.half, fmt=shape, ms=6, lw=1, capsize=2.5, zorder=3,
                  color=colour, ecolor=(*to_rgb(colour), 0.55), mec="white", mew=0.6)


def _draw_lines(axes: Axes, lines: Sequence[tuple[str, float, str]]) -> None:
  """Dashed horizontal lines: (name, y, colour)."""
  for name, y, colour in lines:
    axes.axhline(y, color=colour, lw=1.1, ls="--", zorder=1)
    axes.annotate(name, (1, y), (-2, 2.5), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  fontsize=8, color=MUTED)


def _draw_legend(fig: Figure, group: Group, full: bool = False) -> None:
  colours = Colours(group)
  handles = colours.handles()
  key = marker_key(group, colours) or ""
  handles += [Line2D([], [], marker=marker, ls="", color=MUTED, label=key_value(key, value))
              for value, marker in markers(group, colours).items()]
  if full:
    handles.append(Line2D([], [], marker="s", ls="", color=FULL, label="full"))
  legend(fig, handles)


def _exact(value: float) -> Estimate:
  """A number without an interval."""
  return Estimate(value, None, 1)


def _percent(share: Estimate) -> Estimate:
  return Estimate(share.mean * 100, share.half and share.half * 100, share.n)


def _is_positive(e: Estimate) -> bool:
  return e.n > 0 and e.mean > 0


def _mean(pair: tuple[Setting, Estimate]) -> float:
  return pair[1].mean


def _gain(pair: tuple[Setting, Estimate]) -> float:
  return pair[0].gain.mean


def _parameters(setting: Setting) -> float:
  return float(setting.trainable or 0)


def _count(setting: Setting) -> str:
  return short_count(setting.trainable or 0)


def _short_label(setting: Setting) -> str:
  return setting.label if len(setting.label) <= 34 else setting.label[:33] + "…"

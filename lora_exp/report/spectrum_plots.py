"""Pictures of what adapters learned: singular values by rank, and how far subspaces overlap."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from lora_exp.report.groups import Setting, Study
from lora_exp.report.sentences import RANK
from lora_exp.report.style import FULL, INK, MUTED, Colours, colour_bar, few, figure, legend, log_axis
from lora_exp.report.trials import TrialRecord
from lora_exp.report.update_findings import PERCENT, given, read, shown
from lora_exp.report.updates import Update, one_thread
from lora_exp.report.verdicts import best_by, best_of, is_tuned
from lora_exp.runtime.spectrum import ENERGY, overlap

MOST_LINES = 12
MOST_SHOWN = 64  # directions of a map
Line = tuple[str, Any, list[list[float]]]  # name, colour, the singular values of each module
Map = tuple[str, str, np.ndarray]  # names of the two sides, φ by their numbers of directions


def spectrum(study: Study) -> Figure | None:
  """The singular values of each rank's updates, and the energy in the largest; None if none is known."""
  settings = [s for s in shown(study) if not s.reference]
  if not settings:
    return None
  if RANK in study.keys and all(RANK in s.values for s in settings):
    settings = list(best_by(settings, RANK).values())
  colours = Colours(study)
  picked: list[Setting] = few(settings, MOST_LINES)
  lines: list[Line] = [(s.label, colours.of(s), values_of(s)) for s in picked]
  if study.full in shown(study) and study.full is not None:
    lines.append(("full", FULL, values_of(study.full)))
  top = max(settings, key=given)
  used, most = (top.of(lambda trial, name=name: trial.learned_mean(name)) for name in ("effective_rank", "directions"))
  return spectrum_figure(f"Of rank {given(top):g}, {used.text(1)} directions are used (effective rank), and "
                         f"{PERCENT} of the energy of ΔW lies in {most.text(1)}", lines)


def values_of(s: Setting) -> list[list[float]]:
  return [f.singular_values for trial in s.counted.values() for f in trial.learned]


def spectrum_figure(title: str, lines: Sequence[Line]) -> Figure:
  """Singular values (left) and the share of ‖ΔW‖² in the largest (right), the mean over a line's modules."""
  made, (left, right) = figure(title, panels=2, height=4.4)
  longest = 1
  for _, colour, modules in lines:
    sigma = _mean(modules)
    share = _mean([list(np.cumsum(np.square(m)) / max(np.square(m).sum(), 1e-300)) for m in modules], last=True)
    x = np.arange(1, len(sigma) + 1)
    longest = max(longest, len(x))
    style = {"color": colour, "lw": 1.5, "marker": "o" if len(x) <= 32 else "", "ms": 3.5}
    seen = sigma > 1e-6 * max(float(sigma.max(initial=0.0)), 1e-300)  # below it is float32's rounding
    left.plot(x[seen], sigma[seen], **style)
    right.plot(x, 100 * share, **style)
  log_axis(left.yaxis, [float(y) for line in left.lines for y in np.asarray(line.get_ydata())], integers=False)
  left.set_ylabel("singular value of ΔW")
  right.set_ylabel("share of ‖ΔW‖² in the largest directions (%)")
  right.axhline(100 * ENERGY, color=MUTED, lw=1, ls="--", zorder=1)
  right.annotate(PERCENT, (1, 100 * ENERGY), (-2, 2.5), xycoords=("axes fraction", "data"),
                 textcoords="offset points", ha="right", fontsize=8, color=MUTED)
  right.set_ylim(0, 103)
  for axes in (left, right):
    axes.set_xlabel("direction, the largest first" if axes is left else "number of directions")
    if longest > 2:
      log_axis(axes.xaxis, [1, longest])
      axes.xaxis.set_minor_locator(NullLocator())
    else:
      axes.xaxis.set_major_locator(MaxNLocator(2, integer=True))
  legend(made, [Line2D([], [], color=colour, lw=2.4, label=name if len(name) <= 40 else name[:39] + "…")
                for name, colour, _ in lines])
  return made


def _mean(modules: Sequence[Sequence[float]], last: bool = False) -> np.ndarray:
  """Place by place, over lists of unlike length: past its end a list goes on with 0, or with its last value."""
  most = max((len(m) for m in modules), default=0)
  fill = lambda m: [m[-1] if last and m else 0.0] * (most - len(m))
  return np.array([[*m, *fill(m)] for m in modules]).mean(0) if modules else np.zeros(0)


@one_thread
def overlaps(study: Study, directory: Path) -> Figure | None:
  """φ of the output directions, between two ranks and between two seeds of the largest (Hu et al., figures 3 and 4)."""
  maps = [found for found in (_between_ranks(study, directory), _between_seeds(study, directory)) if found]
  if not maps:
    return None
  rows, columns, phi = maps[0]
  title = (f"{phi[0, -1] * 100:.0f} % of the largest direction of {rows} lies within all those of {columns} (overlap "
           "of the directions among the outputs: 1 where one subspace holds the other)")
  made, axes = figure(title, panels=len(maps), height=4.3 if len(maps) > 1 else 4.6)
  for ax, (down, across, grid) in zip(axes, maps, strict=True):
    image = ax.imshow(grid, cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto",
                      extent=(0.5, grid.shape[1] + 0.5, 0.5, grid.shape[0] + 0.5))
    ax.grid(False)
    ax.set_xlabel(f"j largest directions of {across}")
    ax.set_ylabel(f"i largest directions of {down}")
    for axis, size in ((ax.xaxis, grid.shape[1]), (ax.yaxis, grid.shape[0])):
      axis.set_major_locator(MaxNLocator(min(8, size), integer=True, min_n_ticks=1))
    if grid.shape[1] <= 8 >= grid.shape[0]:
      for i, j in np.ndindex(grid.shape):
        ax.text(j + 1, i + 1, f"{grid[i, j]:.2f}", ha="center", va="center", fontsize=7.5,
                color=INK if grid[i, j] > 0.55 else "white")
  colour_bar(made, image, axes, "overlap φ(i, j)")
  return made


def _between_ranks(study: Study, directory: Path) -> Map | None:
  """A middling rank against the largest that was tried beside it."""
  known = _by_rank(study)
  for top in known:
    same = lambda s, top=top: all(s.values.get(k) == v for k, v in top.values.items() if k != RANK and not is_tuned(k))
    lines = [s for s in known if RANK in s.values and RANK in top.values and s.values[RANK] < top.values[RANK]
             and same(s)]
    if not lines:
      continue
    middle = np.sqrt(min(s.values[RANK] for s in lines) * top.values[RANK])
    level = min({s.values[RANK] for s in lines}, key=lambda r: (abs(np.log(r / middle)), -r))
    small = best_of([s for s in lines if s.values[RANK] == level])
    one = next(iter(small.counted.values()))
    # Of another seed: A of the same one begins as the first columns of the larger rank's.
    others = list(top.counted.values())
    other = next((trial for trial in others if trial.config.get("train.seed") != one.config.get("train.seed")), others[0])
    return _map(directory, small.label, one, top.label, other)
  return None


def _between_seeds(study: Study, directory: Path) -> Map | None:
  """Two seeds of the largest rank that has two."""
  for s in _by_rank(study):
    trials = list({trial.config.get("train.seed"): trial for trial in s.counted.values()}.values())
    if len(trials) > 1:
      return _map(directory, f"{s.label}, a seed", trials[0], "another seed", trials[1])
  return None


def _by_rank(study: Study) -> list[Setting]:
  """The adapters of which something is known, the largest rank first and of equal ones the best."""
  return sorted((s for s in shown(study) if not s.reference), key=lambda s: (-given(s), s.loss.mean))


def _map(directory: Path, down: str, one: TrialRecord, across: str, other: TrialRecord) -> Map | None:
  """φ of two trials' output directions, the mean over the modules that have so many."""
  a, b = read(directory, one), read(directory, other)
  grids = [_phi(a[path], b[path]) for path in a if path in b and a[path].moved and b[path].moved]
  if not grids:
    return None
  total = np.full((len(grids), max(g.shape[0] for g in grids), max(g.shape[1] for g in grids)), np.nan)
  for n, grid in enumerate(grids):
    total[n, : grid.shape[0], : grid.shape[1]] = grid
  return down, across, np.nanmean(total, 0)


def _phi(a: Update, b: Update) -> np.ndarray:
  """φ (i, j) of the directions that are any: beyond, an SVD fills the rank with some."""
  sides = []
  for _, sigma, vt in (a.svd, b.svd):
    alive = int((sigma > 0).any(tuple(range(sigma.ndim - 1))).sum())
    sides.append(np.swapaxes(vt, -1, -2)[..., : min(alive, MOST_SHOWN)])
  phi = overlap(*sides)
  return phi.reshape(-1, *phi.shape[-2:]).mean(0)

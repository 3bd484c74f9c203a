"""How far the subspaces that adapters learned overlap, between ranks and between seeds."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lora_exp.report.findings.finding import RANK
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import given, read, shown
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.plots.style import INK, colour_bar, figure
from lora_exp.report.reading.adapter_updates import Update, one_thread
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.verdicts.tuning import best_of, is_tuned
from lora_exp.runtime.spectrum import overlap

MOST_SHOWN = 64  # directions of a map
Map = tuple[str, str, np.ndarray]  # names of the two sides, φ by their numbers of directions


@one_thread
def overlaps(group: Group, directory: Path) -> Figure | None:
  """φ of the output directions, between two ranks and between two seeds of the largest (Hu et al., figures 3 and 4)."""
  maps = [found for found in (_between_ranks(group, directory), _between_seeds(group, directory)) if found]
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


def _between_ranks(group: Group, directory: Path) -> Map | None:
  """A middling rank against the largest that was tried beside it."""
  known = _by_rank(group)
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
    seed = one.config.get("train.seed")
    other = next((trial for trial in others if trial.config.get("train.seed") != seed), others[0])
    return _map(directory, small.label, one, top.label, other)
  return None


def _between_seeds(group: Group, directory: Path) -> Map | None:
  """Two seeds of the largest rank that has two."""
  for s in _by_rank(group):
    trials = list({trial.config.get("train.seed"): trial for trial in s.counted.values()}.values())
    if len(trials) > 1:
      return _map(directory, f"{s.label}, a seed", trials[0], "another seed", trials[1])
  return None


def _by_rank(group: Group) -> list[Setting]:
  """The adapters of which something is known, the largest rank first and of equal ones the best."""
  return sorted((s for s in shown(group) if not s.reference), key=lambda s: (-given(s), s.penalty))


def _map(directory: Path, down: str, one: RunRecord, across: str, other: RunRecord) -> Map | None:
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

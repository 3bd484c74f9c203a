"""The overlap of the subspaces learned by adapters, between ranks and between seeds."""

from pathlib import Path
from typing import NamedTuple

import altair as alt
import numpy as np

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import LearnedUpdates
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK
from lora_exp.report.plots.axes import title_lines
from lora_exp.report.plots.colours import VIRIDIS
from lora_exp.report.plots.figure import Figure, chart, layered
from lora_exp.report.reading.adapter_updates import ModuleUpdate, one_thread, read_updates
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.verdicts.tuning import best_of, is_tuned
from lora_exp.runtime.spectrum import overlap

MOST_DIRECTIONS = 64  # maximum number of directions in a map
MOST_NUMBERED = 8  # up to this number of directions, the values are written into the map


class OverlapMap(NamedTuple):
  """φ (i, j) of the i largest directions of one run and the j largest of another."""

  rows: str  # name of the first run
  columns: str  # name of the second run
  phi: np.ndarray  # (I, J)


@one_thread
def subspace_overlap(group: Group, updates: LearnedUpdates, directory: Path) -> Figure | None:
  """φ of the output directions, between two ranks and between two seeds of the largest (Hu et al., figures 3 and 4)."""
  between = (_between_ranks(group, updates, directory), _between_seeds(group, updates, directory))
  maps = [found for found in between if found is not None]
  if not maps:
    return None
  rows, columns, phi = maps[0]
  title = (f"{phi[0, -1] * 100:.0f} % of the largest direction of {rows} lies within all those of {columns} (overlap "
           "of the directions among the outputs: 1 where one subspace holds the other)")
  return Figure(title, tuple(_draw_map(one, legend=i == 0) for i, one in enumerate(maps)))


def _draw_map(one: OverlapMap, legend: bool) -> alt.LayerChart:
  """φ as colours; as numbers too where there are few."""
  values = [{"i": i + 1, "j": j + 1, "phi": round(float(phi), 3)} for (i, j), phi in np.ndenumerate(one.phi)
            if np.isfinite(phi)]
  rows, columns = one.phi.shape
  few = max(rows, columns) <= MOST_NUMBERED
  axis = alt.Axis(labelAngle=0) if few else alt.Axis(labelAngle=0, values=[1, *range(8, max(rows, columns) + 1, 8)])
  data = chart(values).encode(
    x=alt.X("j:O", title=title_lines(f"j largest directions of {one.columns}"), axis=axis),
    y=alt.Y("i:O", sort="descending", title=title_lines(f"i largest directions of {one.rows}"), axis=axis))
  scale = alt.Scale(domain=(0, 1), range=list(VIRIDIS))
  color = alt.Color("phi:Q", scale=scale, legend=alt.Legend(title="overlap φ(i, j)") if legend else None)
  tips = [alt.Tooltip("i:Q"), alt.Tooltip("j:Q"), alt.Tooltip("phi:Q")]
  layers = [data.mark_rect().encode(color=color, tooltip=tips)]
  if few:
    dark = alt.ExprRef("datum.phi > 0.6 ? '#111' : 'white'")
    layers.append(data.mark_text(fontSize=11, color=dark).encode(text=alt.Text("phi:Q", format=".2f")))
  return layered(layers)


def _between_ranks(group: Group, updates: LearnedUpdates, directory: Path) -> OverlapMap | None:
  """A medium rank against the largest one, with otherwise equal settings."""
  settings = _by_rank(group, updates)
  for top in settings:
    smaller = [s for s in settings if _is_smaller(s, top)]
    if smaller:
      break
  else:
    return None
  middle = np.sqrt(min(s.values[RANK] for s in smaller) * top.values[RANK])
  ranks = {s.values[RANK]: (abs(np.log(s.values[RANK] / middle)), -s.values[RANK]) for s in smaller}
  rank = min(ranks, key=ranks.__getitem__)
  small = best_of([s for s in smaller if s.values[RANK] == rank])
  one, others = next(iter(small.counted.values())), list(top.counted.values())
  # With the same seed, A starts as the first columns of the larger rank's A.
  seed = one.config.get("train.seed")
  other = next((run for run in others if run.config.get("train.seed") != seed), others[0])
  return _overlap_map(directory, small.label, one, top.label, other)


def _is_smaller(setting: Setting, top: Setting) -> bool:
  """Whether the rank of `setting` is smaller than that of `top`, and all other untuned values are equal."""
  if RANK not in setting.values or RANK not in top.values or setting.values[RANK] >= top.values[RANK]:
    return False
  return all(setting.values.get(k) == v for k, v in top.values.items() if k != RANK and not is_tuned(k))


def _between_seeds(group: Group, updates: LearnedUpdates, directory: Path) -> OverlapMap | None:
  """Two seeds of the largest rank that has two."""
  for setting in _by_rank(group, updates):
    runs = list({run.config.get("train.seed"): run for run in setting.counted.values()}.values())
    if len(runs) > 1:
      return _overlap_map(directory, f"one seed of {setting.label}", runs[0], "another seed", runs[1])
  return None


def _by_rank(group: Group, updates: LearnedUpdates) -> list[Setting]:
  """The adapters that were read, the largest rank first and of equal ones the best."""

  def order(setting: Setting) -> tuple[float, float]:
    return -updates.rank(setting), setting.penalty

  return sorted((s for s in updates.settings(group) if not s.method.is_reference), key=order)


def _overlap_map(directory: Path, rows: str, one: RunRecord, columns: str, other: RunRecord) -> OverlapMap | None:
  """φ of two runs' output directions: at each (i, j) the mean over the modules that have so many."""
  a, b = _updates(directory, one), _updates(directory, other)
  maps = [_phi(a[path], b[path]) for path in a if path in b and a[path].moved and b[path].moved]
  if not maps:
    return None
  padded = np.full((len(maps), max(phi.shape[0] for phi in maps), max(phi.shape[1] for phi in maps)), np.nan)
  for n, phi in enumerate(maps):
    padded[n, : phi.shape[0], : phi.shape[1]] = phi
  return OverlapMap(rows, columns, np.nanmean(padded, 0))


def _updates(directory: Path, run: RunRecord) -> dict[str, ModuleUpdate]:
  """The updates of a run; {} of a damaged adapter, which the report names elsewhere."""
  try:
    return read_updates(directory / run.path, run)
  except (ValueError, KeyError, TypeError):
    return {}


def _phi(a: ModuleUpdate, b: ModuleUpdate) -> np.ndarray:
  """φ (I, J) of one module; of a stack of kernels the mean."""
  phi = overlap(_output_directions(a), _output_directions(b))
  return phi.reshape(-1, *phi.shape[-2:]).mean(0)


def _output_directions(update: ModuleUpdate) -> np.ndarray:
  """The directions (…, O, K) whose singular value is not zero: an SVD fills the rank with arbitrary ones."""
  _, sigma, vt = update.svd
  count = int((sigma > 0).any(tuple(range(sigma.ndim - 1))).sum())
  return np.swapaxes(vt, -1, -2)[..., : min(count, MOST_DIRECTIONS)]

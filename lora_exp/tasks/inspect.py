"""What a run learned, or every run of a sweep: the spectra of its updates, and how they lie to the base's kernels."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from lora_exp import __version__, lora
from lora_exp.config import Config, InputError
from lora_exp.lora import methods
from lora_exp.lora.resize import update_svd
from lora_exp.models.weights import store
from lora_exp.models.weights.stored_tensor import Checkpoint
from lora_exp.report.page.terminal import show_updates
from lora_exp.report.plots.colours import PALETTE
from lora_exp.report.plots.style import save
from lora_exp.report.plots.update_spectrum import spectrum_figure
from lora_exp.report.reading.inspect_file import INSPECT_FILE, weights_digest
from lora_exp.report.sweep_report import make_report
from lora_exp.runtime import console
from lora_exp.runtime.files import write_json
from lora_exp.runtime.mesh import flatten, keep_programs
from lora_exp.runtime.run_directory import is_sweep
from lora_exp.runtime.saved_config import load_config
from lora_exp.runtime.spectrum import (
  ENERGY,
  EXAMINED,
  LARGEST,
  Svd,
  UpdateSpectrum,
  amplification,
  intruders,
  output_side,
  round_off,
  update_spectrum,
)
from lora_exp.train.base import make_base
from lora_exp.train.loaded_run import plan_of
from lora_exp.train.plan import Plan
from lora_exp.train.plan_tables import folded
from lora_exp.train.run_summary import short

MEANS = ("rank", "effective_rank", "stable_rank", "directions", "energy_first", "energy_half", "norm", "relative_norm",
         "amplification", "intruders")
MOST = f"{ENERGY * 100:.0f} %"
COLUMNS = {"rank": "rank", "effective_rank": "used", "stable_rank": "stable", "directions": f"{MOST} in",
           "energy_first": "first", "relative_norm": "ΔW/W", "amplification": "amplified", "intruders": "intruders"}
SMALL = 2**20  # elements of a kernel up to which a second thread of BLAS costs more than it gives
MOST_LINES = 12  # of the picture


def run(cfg: Config) -> None:
  """Looks into the run, or the sweep, in `cfg.run`; writes what it finds there, and shows it."""
  keep_programs(cfg.cache)
  directory = Path(str(cfg.run))
  if is_sweep(str(directory)):
    _sweep(directory)
    return
  [found] = look([Trained(cfg, plan_of(cfg))])
  show(directory, cfg, found)
  keep(directory, cfg, found)
  (directory / "plots").mkdir(exist_ok=True)
  save(figure(cfg, found), directory / "plots" / "spectrum.png")
  console.show(f"PeftTensors: {short(directory / INSPECT_FILE)}, {short(directory / 'plots' / 'spectrum.png')}")


def _sweep(directory: Path) -> None:
  """Every run of a sweep that has an update to look into; then its report, which shows them together."""
  groups: dict[str, list[Trained]] = {}
  for file in sorted(directory.glob("*/config.yaml"), key=lambda f: (not f.parent.name.isdecimal(),
                                                                    f.parent.name.zfill(9))):
    try:
      cfg = replace(load_config(str(file.parent)), task="inspect", run=str(file.parent))
      if methods.of(cfg.lora).changes_kernels:
        trial = Trained(cfg, plan_of(cfg))
        groups.setdefault(repr((cfg.model, cfg.pretrain_data, cfg.mesh, cfg.cache)), []).append(trial)
    except InputError as error:
      console.show_warning(f"left out: {error}")
  if not groups:
    raise InputError(f"run={directory}: no run of this sweep has an update to look into")
  for trials in groups.values():
    for trial, found in zip(trials, look(trials), strict=True):
      keep(trial.directory, trial.cfg, found)
  show_updates(make_report(directory), short(directory / "report.html"))


@dataclass
class Trained:
  """What one run trained."""

  cfg: Config
  plan: Plan  # with its adapter; of lora=full with none

  @property
  def directory(self) -> Path:
    return Path(str(self.cfg.run))

  @cached_property
  def rows(self) -> dict[str, lora.AdaptedModule]:
    """The kernels that it changed, by the path of their module."""
    if not methods.of(self.cfg.lora).trains_everything:
      return {row.path: row for row in self.plan.table}
    shapes = {path: lora.kernel_shape(module) for path, module in lora.modules(self.plan.model()).items()}
    return {path: lora.AdaptedModule(path, *shape, min(shape), 1.0, 1.0) for path, shape in shapes.items()}

  @cached_property
  def source(self) -> Checkpoint:
    return store.open_source(self.directory / store.FILE, self.cfg.cache)

  def whole(self, model: nnx.Module, row: lora.AdaptedModule, like: Mapping[str, Any]) -> np.ndarray:
    """Of lora=full: the trained kernel (…, I, O), where `like` are the base's arrays by path."""
    name = next(f"{row.path}.{end}" for end in ("kernel", "embedding") if f"{row.path}.{end}" in like)
    array = np.empty(like[name].shape, np.float32)
    self.source.read(name, [((slice(None),) * array.ndim, array)])
    return kernel_of(model, row, {name: array})

  def adapted(self, row: lora.AdaptedModule, w: np.ndarray) -> tuple[Svd, np.ndarray]:
    """Of an adapter: ΔW taken apart, without DoRA's norm, and the kernel with all that it adds to W (…, I, O)."""
    assert self.plan.start is not None
    own = replace(self.plan.start, leaves={row.path: self.plan.start.leaves[row.path]})
    narrow = w.astype(np.float32)
    leaves = lora.completed(own, {row.path: narrow})[row.path]
    tuned = own.kind.adapted(narrow, leaves, np.float32(row.scale))
    return update_svd(own.kind, own.leaves[row.path], row.scale, narrow), np.asarray(tuned, np.float64)


def number(values: np.ndarray) -> float | None:
  """The mean of what is finite; None if nothing is."""
  finite = values[np.isfinite(values)]
  return round_off(float(finite.mean())) if finite.size else None


def kernel_of(model: nnx.Module, row: lora.AdaptedModule, arrays: Mapping[str, Any]) -> np.ndarray:
  """The kernel (…, I, O) of a module, out of arrays by their paths in the abstract `model`, in float64."""
  return np.asarray(lora.kernels_of(model, [row], arrays)[row.path], np.float64)


def look(trials: Sequence[Trained]) -> list[list[UpdateSpectrum]]:
  """The facts of every module of the trials, which have one base; a kernel at a time, and W's directions once for all."""
  plan, found = trials[0].plan, [list[UpdateSpectrum]() for _ in trials]
  base, model = flatten(make_base(plan)[0]), plan.model()
  paths = dict.fromkeys(path for trial in trials for path in trial.rows)
  with console.progress("inspect", sum(len(trial.rows) for trial in trials), "kernels") as bar:
    for path in paths:
      having = [(n, trial, trial.rows[path]) for n, trial in enumerate(trials) if path in trial.rows]
      row = having[0][2]
      w = kernel_of(model, row, base)
      sought = min(row.fan_in, row.fan_out) <= LARGEST
      if not sought:
        bar.print(f"{path} is {row.fan_in:,}×{row.fan_out:,}: its intruders are not sought, and of lora=full nothing")
      with threadpool_limits(1 if w.size <= SMALL else None, "blas"):
        own = output_side(w)[1] if sought else None
        for n, trial, own_row in having:
          if not methods.of(trial.cfg.lora).trains_everything:
            svd, tuned = trial.adapted(own_row, w)
            found[n].append(facts_of(own_row, svd[1], w, tuned, own, number(amplification(svd, w))))
          elif sought:
            tuned = trial.whole(model, own_row, base)
            found[n].append(facts_of(own_row, output_side(tuned - w)[0], w, tuned, own, None))
          bar.advance()
  return found


def facts_of(row: lora.AdaptedModule, sigma: np.ndarray, w: np.ndarray, tuned: np.ndarray, own: np.ndarray | None,
             amplified: float | None) -> UpdateSpectrum:
  """The facts of a kernel W that became `tuned`; `own` are W's directions among the outputs, None if not sought."""
  size = np.linalg.norm(w, axis=(-2, -1))
  relative = number(np.linalg.norm(sigma, axis=-1) / np.where(size > 0, size, np.nan))
  new = None if own is None else number(intruders(own, output_side(tuned, EXAMINED)[1]))
  return update_spectrum(row.path, row.rank, sigma, relative_norm=relative, amplification=amplified, intruders=new)


def keep(directory: Path, cfg: Config, found: Sequence[UpdateSpectrum]) -> None:
  """inspect.json: the facts of every module, their means, and which weights they are of."""
  content = {"version": __version__, "run": cfg.run, "method": cfg.lora.method, "weights": weights_digest(directory),
             "mean": means(found), "modules": [asdict(f) for f in found]}
  write_json(directory / INSPECT_FILE, content)


def means(found: Sequence[UpdateSpectrum]) -> dict[str, float | None]:
  """Over modules, of those where there is a value."""
  values = {name: [x for f in found if (x := getattr(f, name)) is not None] for name in MEANS}
  return {name: round_off(float(np.mean(x))) if x else None for name, x in values.items()}


# What is shown


def show(directory: Path, cfg: Config, found: Sequence[UpdateSpectrum]) -> None:
  """A table of the modules, those of all blocks in one line, and what it comes to."""
  rows = [(name, *(_cell(key, means([found[p] for p in places])[key]) for key in COLUMNS))
          for name, places in folded([(f.module, f.rank) for f in found])]
  title = f"What {short(directory)} learned, lora={cfg.lora.method} ({len(found)} modules)"
  console.show_table(title, ("module", *COLUMNS.values()), rows, right=list(COLUMNS.values()))
  for sentence in verdict(cfg, found):
    console.show(sentence)


def _cell(key: str, value: float | None) -> str:
  if value is None:
    return "-"
  return f"{value * 100:.0f} %" if key == "energy_first" else f"{value:.3g}" if key != "rank" else f"{value:g}"


def verdict(cfg: Config, found: Sequence[UpdateSpectrum]) -> Iterator[str]:
  """What the facts come to, a sentence each."""
  mean = {name: math.nan if value is None else value for name, value in means(found).items()}
  if not mean["norm"] > 0:
    yield "No module moved: ΔW is 0 in all of them."
    return
  method = methods.of(cfg.lora)
  of = "the kernels' full rank" if method.trains_everything else "rank"
  yield (f"Of {of} {mean['rank']:.4g}, {mean['effective_rank']:.1f} directions are used on average (effective rank): "
         f"{MOST} of the energy ‖ΔW‖² lies in {mean['directions']:.1f}, "
         f"{mean['energy_first'] * 100:.0f} % in the largest.")
  if math.isfinite(mean["amplification"]):
    yield (f"In its directions ΔW is {mean['amplification']:.3g} times as large as W was there; in all it has "
           f"{mean['relative_norm'] * 100:.3g} % of W's norm.")
  if math.isfinite(mean["intruders"]):
    yield (f"Intruders: of the {EXAMINED} largest directions of W + ΔW, {mean['intruders']:.2g} on average are near "
           "none of W's own.")
  if method.inspect_note:
    yield method.inspect_note


def figure(cfg: Config, found: Sequence[UpdateSpectrum]) -> Figure:
  """The spectra, a line for a kind of module."""
  kinds = folded([(f.module,) for f in found])[:MOST_LINES]
  lines = [(name, PALETTE[i % len(PALETTE)], [found[p].singular_values for p in places])
           for i, (name, places) in enumerate(kinds)]
  return spectrum_figure(next(verdict(cfg, found)), lines)

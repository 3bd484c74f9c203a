"""`task=inspect`: analyses the updates that a run or a sweep learned: their spectra, and their relation to the base."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_exp.config import Config, InputError
from lora_exp.lora import methods
from lora_exp.report.page.terminal import show_updates
from lora_exp.report.plots.colours import PALETTE
from lora_exp.report.plots.figure import Figure
from lora_exp.report.plots.update_spectrum import spectrum_figure
from lora_exp.report.reading.inspect_file import INSPECT_FILE, mean_spectrum, write_inspection
from lora_exp.report.sweep_report import make_report
from lora_exp.runtime import console
from lora_exp.runtime.device import start_jax
from lora_exp.runtime.display_paths import display_path
from lora_exp.runtime.run_directory import is_sweep
from lora_exp.runtime.run_files import CONFIG
from lora_exp.runtime.saved_config import load_config
from lora_exp.runtime.spectrum import ENERGY, EXAMINED, UpdateSpectrum
from lora_exp.train.costs.plan_tables import folded
from lora_exp.train.inspection import TrainedKernels, inspect_runs, trained_kernels

MOST = f"{ENERGY * 100:.0f} %"
COLUMNS = {"rank": "rank", "effective_rank": "used", "stable_rank": "stable", "directions": f"{MOST} in",
           "energy_first": "first", "relative_norm": "ΔW/W", "amplification": "amplified", "intruders": "intruders"}
MOST_LINES = 12  # maximum number of lines in the plot


def run(cfg: Config) -> None:
  """Inspects the run, or each run of the sweep, in `cfg.run`; writes and prints inspect.json."""
  start_jax(cfg.cache)
  directory = Path(str(cfg.run))
  if is_sweep(str(directory)):
    _inspect_sweep(directory, cfg)
    return
  [spectra] = inspect_runs([trained_kernels(cfg)])
  write_inspection(directory, cfg.lora.method, spectra)
  _show(directory, cfg, spectra)
  plot = directory / "plots" / "spectrum.png"
  plot.parent.mkdir(exist_ok=True)
  plot.write_bytes(_figure(cfg, spectra).png)
  console.show(f"Written: {display_path(directory / INSPECT_FILE)}, {display_path(plot)}")


def _inspect_sweep(directory: Path, cfg: Config) -> None:
  """Inspects every run with an update, then writes the sweep's report, which compares them."""
  groups = _by_base(directory)
  if not groups:
    raise InputError(f"run={directory}: no run of this sweep has an update to inspect")
  for runs in groups:
    for trained, spectra in zip(runs, inspect_runs(runs), strict=True):
      write_inspection(trained.directory, trained.cfg.lora.method, spectra)
  report = make_report(directory, cfg.report.metric, cfg.report.margin, cfg.cache)
  show_updates(report, display_path(directory / "report.html"))


def _by_base(sweep: Path) -> list[list[TrainedKernels]]:
  """The finished runs of a sweep that have an update, grouped by base."""
  groups: dict[str, list[TrainedKernels]] = {}
  for directory in sorted((file.parent for file in sweep.glob(f"*/{CONFIG}")), key=_run_number):
    try:
      cfg = replace(load_config(str(directory)), task="inspect", run=str(directory))
      if methods.of(cfg.lora).changes_kernels:
        base = repr((cfg.model, cfg.pretrain_data, cfg.mesh, cfg.cache))
        groups.setdefault(base, []).append(trained_kernels(cfg))
    except InputError as error:
      console.show_warning(f"left out: {error}")
  return list(groups.values())


def _run_number(directory: Path) -> tuple[bool, str]:
  """Orders run directories: numbers first, by value."""
  return not directory.name.isdecimal(), directory.name.zfill(9)


def _show(directory: Path, cfg: Config, spectra: Sequence[UpdateSpectrum]) -> None:
  """Prints a table with a row for each module (corresponding modules of all blocks share a row), and conclusions."""
  rows = []
  for name, places in folded([(spectrum.module, spectrum.rank) for spectrum in spectra]):
    means = mean_spectrum([spectra[place] for place in places])
    rows.append((name, *(_cell(key, means[key]) for key in COLUMNS)))
  title = f"What {display_path(directory)} learned, lora={cfg.lora.method} ({len(spectra)} modules)"
  console.show_table(title, ("module", *COLUMNS.values()), rows, right=list(COLUMNS.values()))
  for sentence in _sentences(cfg, spectra):
    console.show(sentence)


def _cell(key: str, value: float | None) -> str:
  if value is None:
    return "-"
  if key == "energy_first":
    return f"{value * 100:.0f} %"
  return f"{value:g}" if key == "rank" else f"{value:.3g}"


def _sentences(cfg: Config, spectra: Sequence[UpdateSpectrum]) -> Iterator[str]:
  """Yields conclusions from the means over modules, one sentence each."""
  method = methods.of(cfg.lora)
  mean = {name: math.nan if value is None else value for name, value in mean_spectrum(spectra).items()}
  if not mean["norm"] > 0:
    yield "No module changed: ΔW is 0 in all of them."
    return
  yield (f"{_possible(method, mean['rank'])}, {mean['effective_rank']:.1f} directions are used on average (effective "
         "rank): "
         f"{MOST} of the energy ‖ΔW‖² lies in {mean['directions']:.1f}, "
         f"{mean['energy_first'] * 100:.0f} % in the largest.")
  if math.isfinite(mean["amplification"]):
    yield (f"In its own directions, ΔW is {mean['amplification']:.3g} times as large as W. Overall, its norm is "
           f"{mean['relative_norm'] * 100:.3g} % of W's.")
  if math.isfinite(mean["intruders"]):
    yield (f"Intruders: of the {EXAMINED} largest directions of W + ΔW, {mean['intruders']:.2g} on average are not "
           "near any direction of W.")
  if method.inspect_note:
    yield method.inspect_note


def _possible(method: methods.Method, rank: float) -> str:
  """How many directions the updates of a method can have; `rank` is the mean of the modules."""
  if method.trains_everything:
    return f"Of the kernels' full rank {rank:.4g}"
  if method.has_thin_factors:
    return f"Of rank {rank:.4g}"
  return f"With lora.rank={rank:.4g}, which does not bound the rank of ΔW for lora={method.name}"


def _figure(cfg: Config, spectra: Sequence[UpdateSpectrum]) -> Figure:
  """Plots the spectra, one line per kind of module."""
  kinds = folded([(spectrum.module,) for spectrum in spectra])[:MOST_LINES]
  lines = [(name, PALETTE[i % len(PALETTE)], [spectra[place].singular_values for place in places])
           for i, (name, places) in enumerate(kinds)]
  return spectrum_figure(next(_sentences(cfg, spectra)), lines)

"""`task=report run=SWEEP_DIR`: results.csv, plots/*.png, report.md and report.html, from the sweep's files alone."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from lora_exp.config import Config, InputError
from lora_exp.report import page, results_table, update_findings
from lora_exp.report.curves import curves
from lora_exp.report.findings import findings
from lora_exp.report.grids import bars, parallel, surface
from lora_exp.report.groups import Study, studies
from lora_exp.report.history import history
from lora_exp.report.page import Learned, Part, Plot, Report
from lora_exp.report.spectrum_plots import overlaps, spectrum
from lora_exp.report.style import save
from lora_exp.report.tradeoffs import cost, forgetting, pareto, share
from lora_exp.report.trials import TrialRecord, read_sweep

Draw = Callable[[Study, Path], Figure | None]  # of a study and the sweep's directory
PLOTS: dict[str, Draw] = {
  "pareto": lambda study, _: pareto(study),
  "share": lambda study, _: share(study),
  "rate": lambda study, _: surface(study),
  "targets": lambda study, _: bars(study, "lora.targets"),
  "methods": lambda study, _: bars(study, "method"),
  "curves": lambda study, _: curves(study),
  "forgetting": lambda study, _: forgetting(study),
  "cost": lambda study, _: cost(study),
  "history": history,
  "parallel": lambda study, _: parallel(study),
}
SPECTRA: dict[str, Draw] = {"spectrum": lambda study, _: spectrum(study), "overlap": overlaps}
MOST_STUDIES = 4  # with plots of their own


def run(cfg: Config) -> Path:
  """Makes the report of the sweep in `cfg.run` and shows it."""
  if cfg.run is None:
    raise InputError("run=null: task=report needs the directory of a sweep, as outputs/sweeps/DAY/TIME-NAME")
  path = Path(cfg.run) / "report.html"
  report = make_report(path.parent)
  page.show(report, path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
  return path


def make_report(directory: Path) -> Report:
  """Writes the report into `directory`. Raises InputError if it holds no runs."""
  trials, found = make_table(directory)
  plots = directory / "plots"
  plots.mkdir(exist_ok=True)
  parts = [_part(study, n, len(found), plots) for n, study in enumerate(found)]
  for n, part in enumerate(parts):
    part.learned = _learned(part.study, n, len(found), plots)
  report = Report(directory.absolute().name, trials, parts)
  for name, make in (("report.md", page.markdown), ("report.html", page.html)):
    _write(directory / name, partial(Path.write_text, data=make(report), encoding="utf-8"))
  return report


def make_table(directory: Path) -> tuple[list[TrialRecord], list[Study]]:
  """Writes results.csv; the trials of the sweep, and the studies that they are."""
  trials = read_sweep(directory)
  found = studies(trials)
  for study in found:
    update_findings.learn(directory, study)
  _write(directory / "results.csv", lambda path: results_table.write(path, results_table.rows(trials, found)))
  return trials, found


def _part(study: Study, n: int, count: int, directory: Path) -> Part:
  """The findings and plots of one study, the plots written."""
  made = _drawn(PLOTS, study, n, count, directory)
  if count == 1:
    return Part(study, findings(study), made)
  trials = page.ranges([trial.number for trial in study.trials])
  return Part(study, findings(study), made, f"Group {n}: trials {trials}", f"It differs from the others in {study.why}.")


def _learned(study: Study, n: int, count: int, directory: Path) -> Learned | None:
  """The section on what the adapters of a study learned; None where there is none to read."""
  plots = _drawn(SPECTRA, study, n, count, directory)
  if not update_findings.shown(study) and not study.unread:
    return None
  columns = update_findings.columns(study)
  notes = [update_findings.NOTE, *([update_findings.NOTE_W] if len(columns) > len(update_findings.COLUMNS) else [])]
  return Learned(notes, study.unread, columns, update_findings.rows(study), plots)


def _drawn(draws: dict[str, Draw], study: Study, n: int, count: int, directory: Path) -> list[Plot]:
  """The plots that there are, written; what an earlier report had of the others is taken away."""
  made = []
  for name, draw in draws.items() if n < MOST_STUDIES else ():
    path = directory / (f"{name}.png" if count == 1 else f"{name}-{n}.png")
    path.unlink(missing_ok=True)
    if (figure := draw(study, directory.parent)) is not None:
      save(figure, path)
      made.append(Plot(" ".join(figure.get_suptitle().split()), path))
  return made


def _write(path: Path, write: Callable[[Path], object]) -> None:
  """Under a temporary name, then renamed."""
  temporary = path.with_name(f".{path.name}.tmp")
  write(temporary)
  os.replace(temporary, path)

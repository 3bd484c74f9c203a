"""Writes the report of a sweep from its files alone: results.csv, plots/*.png, report.md and report.html."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import findings
from lora_exp.report.grouping import learned_updates
from lora_exp.report.grouping.group import Group, make_groups
from lora_exp.report.page import results_table, updates_table
from lora_exp.report.page.document import GroupSection, Plot, Report, UpdatesSection
from lora_exp.report.page.html import html
from lora_exp.report.page.markdown import markdown
from lora_exp.report.page.settings_table import number_ranges
from lora_exp.report.plots.best_by_level import bars
from lora_exp.report.plots.loss_curves import curves
from lora_exp.report.plots.parallel_coordinates import parallel
from lora_exp.report.plots.rate_by_rank import surface
from lora_exp.report.plots.style import save
from lora_exp.report.plots.subspace_overlap import overlaps
from lora_exp.report.plots.tradeoffs import cost, forgetting, pareto, share
from lora_exp.report.plots.trial_history import history
from lora_exp.report.plots.update_spectrum import spectrum
from lora_exp.report.reading.run_files import read_sweep
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.files import write_atomically

Draw = Callable[[], Figure | None]
MOST_PLOTTED = 4  # groups that have plots


def make_report(directory: Path, metric: str = "loss") -> Report:
  """Writes the report into the sweep `directory`, ranked by `metric`. Raises InputError if it holds no runs."""
  trials, groups = make_table(directory, metric)
  (directory / "plots").mkdir(exist_ok=True)
  sections = [_section(directory, group, n, len(groups)) for n, group in enumerate(groups)]
  report = Report(directory.absolute().name, METRICS[metric], trials, sections)
  for name, render in (("report.md", markdown), ("report.html", html)):
    write_atomically(directory / name, partial(Path.write_text, data=render(report), encoding="utf-8"))
  return report


def make_table(directory: Path, metric: str = "loss") -> tuple[list[RunRecord], list[Group]]:
  """Writes results.csv; returns the trials of the sweep and the groups that they form."""
  trials = read_sweep(directory)
  groups = make_groups(trials, METRICS[metric])
  for group in groups:
    learned_updates.learn(directory, group)
  write_atomically(directory / "results.csv", partial(results_table.write, table=results_table.rows(trials, groups)))
  return trials, groups


def _section(directory: Path, group: Group, n: int, count: int) -> GroupSection:
  """The section of the n-th of `count` groups, its plots written."""
  suffix = "" if count == 1 else f"-{n}"
  plots = _plots(directory, group, n, suffix)
  updates = _updates_section(directory, group, n, suffix)
  if count == 1:
    return GroupSection(group, findings(group), plots, updates)
  heading = f"Group {n}: trials {number_ranges([trial.number for trial in group.trials])}"
  return GroupSection(group, findings(group), plots, updates, heading, f"It differs from the others in {group.why}.")


def _plots(directory: Path, group: Group, n: int, suffix: str) -> list[Plot]:
  draws: list[tuple[str, Draw]] = [
    ("pareto", partial(pareto, group)),
    ("share", partial(share, group)),
    ("rate", partial(surface, group)),
    ("targets", partial(bars, group, "lora.targets")),
    ("methods", partial(bars, group, "method")),
    ("curves", partial(curves, group)),
    ("forgetting", partial(forgetting, group)),
    ("cost", partial(cost, group)),
    ("history", partial(history, group, directory)),
    ("parallel", partial(parallel, group)),
  ]
  return _write_plots(directory, draws, suffix) if n < MOST_PLOTTED else []


def _updates_section(directory: Path, group: Group, n: int, suffix: str) -> UpdatesSection | None:
  """What the adapters of a group learned; None if no adapter was read and none is damaged."""
  draws: list[tuple[str, Draw]] = [
    ("spectrum", partial(spectrum, group)),
    ("overlap", partial(overlaps, group, directory)),
  ]
  plots = _write_plots(directory, draws, suffix) if n < MOST_PLOTTED else []
  if not learned_updates.shown(group) and not group.unread:
    return None
  unread = [f"Not read: {text}." for text in group.unread]
  columns = updates_table.columns(group)
  return UpdatesSection(updates_table.HEADING, updates_table.notes(columns), unread, columns, updates_table.rows(group),
                        plots)


def _write_plots(directory: Path, draws: Iterable[tuple[str, Draw]], suffix: str) -> list[Plot]:
  """Writes plots/NAME.png for each figure; the file of a figure that is no longer drawn is removed."""
  plots = []
  for name, draw in draws:
    path = directory / "plots" / f"{name}{suffix}.png"
    path.unlink(missing_ok=True)
    if (figure := draw()) is not None:
      save(figure, path)
      plots.append(Plot(" ".join(figure.get_suptitle().split()), path))
  return plots

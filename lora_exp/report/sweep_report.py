"""Writes the report of a sweep from its files alone: results.csv, plots/*.png, report.md and report.html."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.grouping.group import Group, make_groups
from lora_exp.report.grouping.learned_updates import LearnedUpdates, learn_updates
from lora_exp.report.grouping.repeated_trials import repeated_trials
from lora_exp.report.grouping.setting_keys import METHOD, RANK, TARGETS
from lora_exp.report.page import updates_table
from lora_exp.report.page.compared import compared
from lora_exp.report.page.document import GroupSection, Plot, Report, UpdatesSection
from lora_exp.report.page.html_page import html
from lora_exp.report.page.markdown import markdown
from lora_exp.report.page.results_table import results, write_csv
from lora_exp.report.page.settings_table import number_ranges
from lora_exp.report.plots.best_by_level import best_by_level
from lora_exp.report.plots.figure import Figure
from lora_exp.report.plots.loss_curves import loss_curves
from lora_exp.report.plots.parallel_coordinates import parallel_coordinates
from lora_exp.report.plots.rate_by_rank import rate_by_rank
from lora_exp.report.plots.subspace_overlap import subspace_overlap
from lora_exp.report.plots.tradeoffs import cost, forgetting, pareto
from lora_exp.report.plots.trial_history import trial_history
from lora_exp.report.plots.update_spectrum import update_spectrum_plot
from lora_exp.report.reading.run_reader import read_sweep
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.reading.sweep_ledger import read_sweep_ledger
from lora_exp.report.verdicts.judgement import MARGIN
from lora_exp.report.verdicts.states import level_states, setting_states
from lora_exp.runtime.files import write_atomically

Draw = Callable[[], Figure | None]  # None: the group has nothing to show in this plot
MOST_PLOTTED = 4  # groups that have plots


def make_report(
  directory: Path, metric: str | None = None, margin: float = MARGIN, cache_dir: str | None = None
) -> Report:
  """Writes the report into the sweep `directory`, ranked by `metric`; `margin` is report.margin.

  If `metric` is None, it is the first one that the sweep's study optimised, or else the loss. The script of the page is
  cached in `cache_dir`. Raises InputError if the directory contains no runs.
  """
  metric = metric or _studied_metric(directory)
  runs, groups, updates = make_table(directory, metric, margin)
  (directory / "plots").mkdir(exist_ok=True)
  sections = [_section(directory, group, updates[n], n, len(groups)) for n, group in enumerate(groups)]
  damage = [*(f"{problem}." for problem in read_sweep_ledger(directory).problems), *repeated_trials(groups)]
  report = Report(directory.absolute().name, METRICS[metric], runs, sections, compared(directory, runs), damage)
  for name, text in (("report.md", markdown(report)), ("report.html", html(report, cache_dir))):
    write_atomically(directory / name, partial(Path.write_text, data=text, encoding="utf-8"))
  return report


def _studied_metric(directory: Path) -> str:
  """The first metric among the objectives of the sweep's study; the loss if there is none."""
  objectives = read_sweep_ledger(directory).objectives
  return next((name for name in objectives if name in METRICS), "loss")


def make_table(
  directory: Path, metric: str = "loss", margin: float = MARGIN
) -> tuple[list[RunRecord], list[Group], list[LearnedUpdates]]:
  """Writes results.csv; returns the runs of the sweep, their groups, and what the adapters of each group learned."""
  runs = read_sweep(directory)
  groups = make_groups(runs, METRICS[metric], margin, read_sweep_ledger(directory).look)
  updates = [learn_updates(directory, group) for group in groups]
  write_atomically(directory / "results.csv", partial(write_csv, rows=results(runs, groups, updates)))
  return runs, groups, updates


def _section(directory: Path, group: Group, updates: LearnedUpdates, n: int, count: int) -> GroupSection:
  """The section of the n-th of `count` groups, its plots written."""
  suffix = "" if count == 1 else f"-{n}"
  plots, update_plots = _draws(directory, group), _update_draws(directory, group, updates)
  return GroupSection(
    group,
    all_findings(group, updates),
    _write_plots(directory, plots, suffix) if n < MOST_PLOTTED else [],
    _updates_section(group, updates, _write_plots(directory, update_plots, suffix) if n < MOST_PLOTTED else []),
    heading="" if count == 1 else f"Group {n}: trials {number_ranges([run.number for run in group.runs])}",
    note="" if count == 1 else f"It differs from the others in {group.why}.",
  )


def _draws(directory: Path, group: Group) -> list[tuple[str, Draw]]:
  """(file name, plot) of a group, in the order of the page."""
  states = setting_states(group)
  return [
    ("pareto", partial(pareto, group, states)),
    ("rate", partial(rate_by_rank, group)),
    ("targets", partial(best_by_level, group, TARGETS, level_states(group, TARGETS, (RANK,)))),
    ("methods", partial(best_by_level, group, METHOD, level_states(group, METHOD, (RANK,)))),
    ("curves", partial(loss_curves, group)),
    ("forgetting", partial(forgetting, group)),
    ("cost", partial(cost, group)),
    ("history", partial(trial_history, group, directory)),
    ("parallel", partial(parallel_coordinates, group)),
  ]


def _update_draws(directory: Path, group: Group, updates: LearnedUpdates) -> list[tuple[str, Draw]]:
  """(file name, plot) of what the adapters of a group learned."""
  return [
    ("spectrum", partial(update_spectrum_plot, group, updates)),
    ("overlap", partial(subspace_overlap, group, updates, directory)),
  ]


def _updates_section(group: Group, updates: LearnedUpdates, plots: list[Plot]) -> UpdatesSection | None:
  """What the adapters of a group learned; None if no adapter was read and none is damaged."""
  if not updates.settings(group) and not updates.unread:
    return None
  return UpdatesSection(
    updates_table.HEADING,
    updates_table.notes(group, updates),
    [f"Not read: {problem}." for problem in updates.unread],
    updates_table.columns(group, updates),
    updates_table.rows(group, updates),
    plots,
  )


def _write_plots(directory: Path, draws: Iterable[tuple[str, Draw]], suffix: str) -> list[Plot]:
  """Writes plots/NAME.png for each figure; the file of a figure that is no longer drawn is removed."""
  plots = []
  for name, draw in draws:
    path = directory / "plots" / f"{name}{suffix}.png"
    path.unlink(missing_ok=True)
    if (figure := draw()) is not None:
      path.write_bytes(figure.png)
      plots.append(Plot(figure, path))
  return plots

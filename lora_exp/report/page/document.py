"""The content of a report, independent of its output as HTML, Markdown or terminal text."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from lora_exp.config.metrics import Metric
from lora_exp.report.findings.finding import Finding, Headline, headline
from lora_exp.report.grouping.group import Group
from lora_exp.report.page.compared import Facts
from lora_exp.report.page.settings_table import setting_columns, setting_rows
from lora_exp.report.page.trials_table import trial_columns, trial_rows
from lora_exp.report.plots.figure import Figure
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.verdicts.judgement import LEVEL

PRUNED = (
  "A pruned trial was stopped by its sweep, for the reason given with it. It did not fail, and has no result at full "
  "length to compare."
)
EXPORTED = (
  "The {label} of a trial is the held-out {label} of the state that it exports: the one with the lowest held-out loss, "
  "or the last with train.export=last; that of a frozen base is its {label} at step 0."
)
METHOD = (
  "Trials that differ in seed (train.seed, data.seed) "
  "and model.seed alone are one setting: its mean, ± the half width of the 95 % interval (Student's t).",
  "The margin is a share of the best setting's gain over the base (report.margin). A setting is sufficient if it is "
  "shown to be less than the margin worse than every other one compared (one-sided tests, each at "
  f"{LEVEL * 100:g} % or less; ranks and alphas from the best outwards, other settings with Bonferroni's correction), "
  "insufficient if it is shown to be more than the margin worse than one of them (Holm's correction over all pairs), "
  "and undecided otherwise. Tuned values are chosen without the seed that they are scored on. A diverged seed counts "
  "against its setting; fewer than three seeds decide nothing.",
  "Gain is the improvement over the base. The share of full fine-tuning is 0 % at the base and 100 % at "
  "lora=full. results.csv has a row for each trial, and every number here follows from it.",
)


@dataclass(frozen=True)
class Plot:
  """One figure of the report, and the file that it was written to."""

  figure: Figure
  file: Path  # PNG

  @property
  def title(self) -> str:
    return self.figure.heading


@dataclass(frozen=True)
class UpdatesSection:
  """The section on the learned updates of a group."""

  heading: str
  notes: list[str]
  unread: list[str]  # adapters that could not be read, a sentence each
  columns: list[str]
  rows: list[list[str]]
  plots: list[Plot]


@dataclass(frozen=True)
class GroupSection:
  """The section of one group."""

  group: Group
  findings: list[Finding]
  plots: list[Plot]
  updates: UpdatesSection | None
  heading: str = ""  # empty if there is one group
  note: str = ""

  @property
  def headline(self) -> Headline:
    """The question of the group and its answer."""
    return headline(self.findings)

  @property
  def columns(self) -> list[str]:
    """The headings of the table of settings."""
    return setting_columns(self.group)

  @property
  def rows(self) -> list[list[str]]:
    """The table of settings, under `columns`."""
    return setting_rows(self.group)


@dataclass(frozen=True)
class Report:
  """Everything on the page."""

  title: str
  metric: Metric  # that ranks the settings
  runs: list[RunRecord]
  sections: list[GroupSection]
  compared: Facts  # what the trials have in common
  damage: list[str] = field(default_factory=list)  # damaged lines of the ledger and repeated trials, a sentence each

  @property
  def question(self) -> str:
    """The question of the largest group."""
    return self.sections[0].headline.question if self.sections else "What does this sweep show?"

  @property
  def summary(self) -> str:
    """A sentence with the number of trials by status, and the number of settings."""
    statuses = ", ".join(f"{n} {status}" for status, n in Counter(run.status for run in self.runs).items())
    settings = sum(not setting.only_tuned for section in self.sections for setting in section.group.settings)
    trials = len(self.runs)
    return f"{trials} trial{'s' * (trials != 1)} ({statuses}) of {settings} setting{'s' * (settings != 1)}."

  @property
  def warnings(self) -> list[str]:
    """Sentences on restrictions of the comparison: several groups, counted trials with damaged files, repetitions."""
    groups = []
    if len(self.sections) > 1:
      why = dict.fromkeys(section.group.why for section in self.sections if section.group.why)
      groups = [f"The trials form {len(self.sections)} groups that differ in {'; '.join(why)}. Their results are not "
                "compared with each other; each group has its own findings."]
    counted = [run for run in self.runs if run.result(self.metric.name) is not None and run.reason]
    return [*groups, *(f"Trial {run} counts, but {run.reason}." for run in counted), *self.damage]

  @property
  def not_counted(self) -> list[list[str]]:
    """Trial, setting, status and reason of each trial that is not counted."""
    labels = self._labels
    missing = f"it has no held-out {self.metric.label}"
    return [[str(run), labels.get(id(run), "-"), run.status, run.reason or missing]
            for run in self.runs if run.result(self.metric.name) is None]

  @property
  def trial_columns(self) -> list[str]:
    """The headings of the table of trials."""
    return trial_columns(self.metric)

  @property
  def trial_rows(self) -> list[list[str]]:
    """The table of trials, under `trial_columns`."""
    return trial_rows(self.runs, self._labels, self.metric)

  @property
  def _labels(self) -> dict[int, str]:
    """id of a run -> the label of its setting."""
    return {id(run): setting.label for section in self.sections for setting in section.group.settings
            for run in setting.runs}

  @property
  def method(self) -> list[str]:
    """How to read the report."""
    return [*([PRUNED] if any(run.status == "pruned" for run in self.runs) else []),
            EXPORTED.format(label=self.metric.label), *METHOD, *self._looks]

  @property
  def _looks(self) -> list[str]:
    """The level of the tests, if the sweep looked at the verdicts while it added seeds."""
    look = self.sections[0].group.look if self.sections else None
    if look is None:
      return []
    times = f"{look.count} time{'s' * (look.count != 1)}"
    return [f"This sweep looked at the verdicts {times} while it added seeds. Tests on ranks, targets, alpha and "
            f"methods are at the level of the last look, {look.level * 100:.2g} %, so that all looks together share "
            f"{look.of_level * 100:g} %."]

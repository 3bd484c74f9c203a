"""The report on the terminal: the settings, the findings, the trials that are not counted."""

from pathlib import Path

from lora_exp.report.findings.used_rank import USED_RANK
from lora_exp.report.page.document import GroupSection, Report, UpdatesSection
from lora_exp.report.page.settings_table import score_column
from lora_exp.runtime import console

TOO_WIDE = ("stable rank", "largest", "‖ΔW‖", "inputs shared")  # omitted columns of the table of updates
MOST_ROWS = 30  # maximum number of settings in a table; the page shows all


def show(report: Report, page: Path | None = None) -> None:
  """Shows the question and its answer, each group's settings and findings, the warnings, and the path of the page."""
  console.show(report.question)
  for section in report.sections:
    answer = section.headline.answer
    console.show(f"{section.heading}: {answer}" if section.heading else answer)
  if len(report.sections) > 1:
    console.show(f"{report.title}: {report.summary}")
  for section in report.sections:
    _show_settings(report, section)
    for finding in section.findings:
      console.show(f"{finding.topic}: {finding.text}")
  for text in report.warnings:
    console.show_warning(text)
  for number, _, status, reason in report.not_counted:
    if status != "pruned":  # a pruned trial is no failure
      console.show_warning(f"trial {number}: {status}: {reason}")
  if page is not None:
    console.show(f"Report: {page}")


def show_updates(report: Report, page: str) -> None:
  """Shows the learned updates of each group, and the path of the page."""
  for section in report.sections:
    if section.updates is None:
      continue
    _show_updates(section.heading or report.title, section.updates)
    for finding in section.findings:
      if finding.topic == USED_RANK:
        console.show(f"{finding.topic}: {finding.text}")
    for text in section.updates.unread:
      console.show_warning(text)
  console.show(f"Report: {page}")


def _show_settings(report: Report, section: GroupSection) -> None:
  shown = ["setting", score_column(section.group), "gain", "% of full", "trainable"]
  places = [section.columns.index(name) for name in shown]
  rows = [[row[i] for i in places] for row in section.rows]
  title = section.heading or f"{report.title}: {report.summary}"
  console.show_table(title, shown, rows[:MOST_ROWS], right=shown[1:])
  if len(rows) > MOST_ROWS:
    console.show(f"and {len(rows) - MOST_ROWS} more settings")


def _show_updates(heading: str, updates: UpdatesSection) -> None:
  places = [i for i, name in enumerate(updates.columns) if name not in TOO_WIDE]
  columns = [updates.columns[i] for i in places]
  rows = [[row[i] for i in places] for row in updates.rows[:MOST_ROWS]]
  title = f"{heading}: {updates.heading[:1].lower()}{updates.heading[1:]}"
  console.show_table(title, columns, rows, right=columns[1:])

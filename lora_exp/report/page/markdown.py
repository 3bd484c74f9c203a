"""The report as Markdown; its figures are the files in plots/."""

from collections.abc import Iterator, Sequence

from lora_exp.report.findings.finding import Finding
from lora_exp.report.page.compared import COMMAND
from lora_exp.report.page.document import GroupSection, Plot, Report, UpdatesSection

MARKUP = ("\\", "|", "*", "_", "<", "`", "[")


def markdown(report: Report) -> str:
  """The report as Markdown text."""
  lines = [f"# {_escaped(report.question)}", ""]
  for section in report.sections:
    group = f"**{_escaped(section.heading)}.** " if section.heading else ""
    lines += [f"> {group}{_escaped(section.headline.answer)}", ""]
  lines += [f"{_escaped(report.title)}: {report.summary}", ""]
  lines += [f"- {name}: {_code(value) if name == COMMAND else _escaped(value)}" for name, value in report.compared]
  lines += [f"\n**{text}**" for text in report.warnings]
  for section in report.sections:
    lines += _group_section(section)
  if report.not_counted:
    lines += ["", "## Trials that are not counted", ""]
    lines += _table(("trial", "setting", "status", "reason"), report.not_counted)
  return "\n".join([*lines, "", "## How to read this", "", *(f"{text}\n" for text in report.method)])


def _group_section(section: GroupSection) -> Iterator[str]:
  yield from ["", f"## {_escaped(section.heading or 'Findings')}", ""]
  if section.note:
    yield from [section.note, ""]
  yield from map(_finding, section.findings)
  for plot in section.plots:
    yield from ["", _image(plot)]
  yield from ["", *_table(section.columns, section.rows, right=range(1, len(section.columns)))]
  if section.updates:
    yield from _updates_section(section.updates)


def _updates_section(section: UpdatesSection) -> Iterator[str]:
  yield from ["", f"### {section.heading}", ""]
  for plot in section.plots:
    yield from [_image(plot), ""]
  if section.rows:
    yield from _table(section.columns, section.rows, right=range(1, len(section.columns)))
  yield ""
  for text in (*section.notes, *section.unread):
    yield f"{_escaped(text)}\n"


def _finding(finding: Finding) -> str:
  topic = f"{finding.topic}{'' if finding.concluded else ', not concluded'}"
  evidence = f" _Evidence: {_escaped(finding.evidence)}_" if finding.evidence else ""
  return f"- **{topic}.** {_escaped(finding.text)}{evidence}"


def _image(plot: Plot) -> str:
  return f"![{_escaped(plot.title)}](plots/{plot.file.name})"


def _code(text: str) -> str:
  """Inline code; backticks of the text would end it."""
  return f"`{text.replace('`', ' ')}`"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
  """A table with the columns whose numbers are in `right` aligned to the right."""
  rule = "|" + "|".join(" ---: " if i in right else " --- " for i in range(len(columns))) + "|"
  return [_table_row(columns), rule, *map(_table_row, rows)]


def _table_row(cells: Sequence[str]) -> str:
  return "| " + " | ".join(_escaped(cell).replace("\n", " ") for cell in cells) + " |"


def _escaped(text: str) -> str:
  """`text` with the characters that are Markdown markup escaped."""
  for mark in MARKUP:
    text = text.replace(mark, f"\\{mark}")
  return text

"""The report as a page without a network, as Markdown, and as a table on the terminal."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from lora_exp.report.groups import Setting, Study
from lora_exp.report.sentences import Finding
from lora_exp.report.style import DPI
from lora_exp.report.trials import TrialRecord
from lora_exp.report.update_findings import HEADING, USED
from lora_exp.report.verdicts import TEST, TOLERANCE
from lora_exp.runtime import console

COLUMNS = ("setting", "trials", "seeds", "held-out loss", "gain", "% of full", "trainable", "%")
WIDE = ("stable rank", "largest", "‖ΔW‖", "inputs shared")  # columns that a terminal has no room for
UNREAD = "Not read: {}."  # of a damaged adapter
TERMINAL = 30  # settings on the screen; the page has all


@dataclass
class Plot:
  """One picture of the report."""

  title: str
  file: Path  # PNG, 8-bit, at twice the size of the page

  @property
  def data(self) -> str:
    return base64.b64encode(self.file.read_bytes()).decode()

  @property
  def width(self) -> int:
    return int.from_bytes(self.file.read_bytes()[16:20], "big") * 96 // DPI

  @property
  def height(self) -> int:
    return int.from_bytes(self.file.read_bytes()[20:24], "big") * 96 // DPI


@dataclass
class Learned:
  """The section on what the adapters learned."""

  notes: list[str]
  unread: list[str]
  columns: list[str]
  rows: list[list[str]]
  plots: list[Plot]
  heading: str = HEADING


@dataclass
class Part:
  """What the report says of one study."""

  study: Study
  findings: list[Finding]
  plots: list[Plot]
  heading: str = ""  # if there are several studies
  note: str = ""
  learned: Learned | None = None
  columns: list[tuple[str, bool]] = field(default_factory=lambda: [(name, i > 0) for i, name in enumerate(COLUMNS)])

  @property
  def rows(self) -> list[list[str]]:
    return [row(self.study, s) for s in self.study.settings]


@dataclass
class Report:
  """Everything on the page."""

  title: str
  trials: list[TrialRecord]
  parts: list[Part]

  @property
  def summary(self) -> str:
    counts: dict[str, int] = {}
    for trial in self.trials:
      counts[trial.status] = counts.get(trial.status, 0) + 1
    words = ", ".join(f"{n} {status}" for status, n in counts.items())
    settings = sum(len(part.study.settings) for part in self.parts)
    return f"{len(self.trials)} trial{'s' * (len(self.trials) != 1)} ({words}) of {settings} setting{'s' * (settings != 1)}."

  @property
  def warnings(self) -> list[str]:
    if len(self.parts) < 2:
      return []
    why = dict.fromkeys(part.study.why for part in self.parts if part.study.why)
    return [f"The trials are of {len(self.parts)} groups that differ in {'; '.join(why)}. Their losses are not compared "
            "with each other; each group has its own findings."]

  @property
  def lost(self) -> list[list[str]]:
    """TrialRecord, setting, status and reason of each trial that no mean holds."""
    names = {id(trial): s.label for part in self.parts for s in part.study.settings for trial in s.trials}
    return [[str(trial), names.get(id(trial), "-"), trial.status, trial.reason or "-"] for trial in self.trials if trial.loss is None]

  @property
  def method(self) -> list[str]:
    pruned = ("A pruned trial was stopped by its study, because its loss was among the worst of its batch at that step: "
              "no failure, and no result to compare at full length.")  # fmt: skip
    return [
      *([pruned] if any(trial.status == "pruned" for trial in self.trials) else []),
      "The loss of a trial is the held-out loss of the state that it exports: the best of its evaluations, or the last "
      "with train.export=last; that of a frozen base is its loss at step 0. Trials that differ in train.seed, data.seed "
      "and model.seed alone are one setting: its mean, ± the half width of the 95 % interval (Student's t).",
      f"A setting is not measurably worse than the best if it passes this test: {TEST}. Fewer than three seeds decide "
      "nothing, and neither does a best value on the edge of what was tried.",
      f"The tolerance of {TOLERANCE * 100:g} % keeps a difference that is measurable but of no use from deciding.",
      "Gain is the fall below the loss of the base. The share of full fine-tuning is 0 % at the base and 100 % at "
      "lora=full. results.csv has a row for each trial, and every number here follows from it.",
    ]


def row(study: Study, s: Setting) -> list[str]:
  """A setting in the table of the report."""
  trial = next(iter(s.counted.values()), s.trials[0])
  percent = trial.number_at("parameters", "percent")
  return [s.label, ranges([a.number for a in s.trials]), f"{s.seeds}", s.loss.text(), s.gain.text(),
          study.share(s).text(1, factor=100), f"{s.trainable:,}" if s.trainable is not None else "-",
          f"{percent:.3g}" if percent is not None else "-"]


def ranges(numbers: Sequence[int]) -> str:
  """As 0-2, 6."""
  found: list[list[int]] = []
  for n in sorted(numbers):
    if found and n == found[-1][-1] + 1:
      found[-1].append(n)
    else:
      found.append([n])
  return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in found)


def html(report: Report) -> str:
  """The page: one file, its pictures inside."""
  source = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  return environment.from_string(source).render(
    title=report.title, summary=report.summary, warnings=report.warnings, parts=report.parts, lost=report.lost,
    method=report.method, unread=UNREAD)


def markdown(report: Report) -> str:
  """The same as Markdown; the pictures lie beside it in plots/."""
  lines = [f"# {_escaped(report.title)}", "", report.summary, *(f"\n**{text}**" for text in report.warnings)]
  for part in report.parts:
    lines += ["", f"## {_escaped(part.heading or 'What it says')}", ""]
    lines += [part.note, ""] if part.note else []
    for f in part.findings:
      lines += [f"- **{f.topic}{'' if f.concluded else ', not concluded'}.** {_escaped(f.text)}"
                + (f" _Evidence: {_escaped(f.evidence)}_" if f.evidence else "")]
    for plot in part.plots:
      lines += ["", f"![{_escaped(plot.title)}](plots/{plot.file.name})"]
    lines += ["", *_table(COLUMNS, part.rows, right=range(1, len(COLUMNS)))]
    lines += _learned(part.learned) if part.learned else []
  if report.lost:
    lines += ["", "## Trials that are not counted", "", *_table(("trial", "setting", "status", "reason"), report.lost)]
  return "\n".join([*lines, "", "## How to read this", "", *(f"{text}\n" for text in report.method)])


def _learned(section: Learned) -> list[str]:
  """What the adapters learned, as Markdown."""
  lines = ["", f"### {section.heading}", ""]
  for plot in section.plots:
    lines += [f"![{_escaped(plot.title)}](plots/{plot.file.name})", ""]
  lines += _table(section.columns, section.rows, right=range(1, len(section.columns))) if section.rows else []
  return [*lines, "", *(f"{_escaped(text)}\n" for text in (*section.notes, *map(UNREAD.format, section.unread)))]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
  line = lambda cells: "| " + " | ".join(_escaped(c).replace("\n", " ") for c in cells) + " |"
  return [line(columns), "|" + "|".join(" ---: " if i in right else " --- " for i in range(len(columns))) + "|",
          *map(line, rows)]


def _escaped(text: str) -> str:
  """Text of people as Markdown shows it."""
  for mark in ("\\", "|", "*", "_", "<", "`", "["):
    text = text.replace(mark, f"\\{mark}")
  return text


def show(report: Report, page: Path) -> None:
  """The settings, the sentences and where the page is, on the terminal."""
  for part in report.parts:
    rows = part.rows
    keep = [0, 3, 4, 5, 6]
    title = f"{part.heading or report.title}: {report.summary}"
    console.show_table(title, [COLUMNS[i] for i in keep], [[r[i] for i in keep] for r in rows[:TERMINAL]],
                      right=[COLUMNS[i] for i in keep[1:]])
    if len(rows) > TERMINAL:
      console.show(f"and {len(rows) - TERMINAL} more settings")
    for f in part.findings:
      console.show(f"{f.topic}: {f.text}")
  for text in report.warnings:
    console.show_warning(text)
  for number, _, status, reason in report.lost:
    if status == "pruned":  # as was asked
      continue
    console.show_warning(f"trial {number}: {status}: {reason}")
  console.show(f"Report: {page}")


def show_learned(report: Report, page: str) -> None:
  """What the adapters learned and where the page is, on the terminal."""
  for part in report.parts:
    if part.learned is None:
      continue
    title = f"{part.heading or report.title}: {part.learned.heading[:1].lower()}{part.learned.heading[1:]}"
    keep = [i for i, name in enumerate(part.learned.columns) if name not in WIDE]
    columns = [part.learned.columns[i] for i in keep]
    rows = [[row[i] for i in keep] for row in part.learned.rows[:TERMINAL]]
    console.show_table(title, columns, rows, right=columns[1:])
    for f in part.findings:
      if f.topic == USED:
        console.show(f"{f.topic}: {f.text}")
    for text in part.learned.unread:
      console.show_warning(UNREAD.format(text))
  console.show(f"Report: {page}")

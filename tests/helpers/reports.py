"""Reports of sweeps, read back: findings, results.csv and the page."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

from lora_exp.config.metrics import METRICS
from lora_exp.report.findings.all_findings import all_findings
from lora_exp.report.findings.finding import Finding
from lora_exp.report.grouping.group import make_groups
from lora_exp.report.reading.run_reader import read_sweep


def findings_on(directory: Path, topic: str, group: int = 0, metric: str = "loss",
                margin: float = 0.05) -> list[Finding]:
  """The findings on a topic in one group of a sweep."""
  groups = make_groups(read_sweep(directory), METRICS[metric], margin)
  return [finding for finding in all_findings(groups[group]) if finding.topic == topic]


def read_results(directory: Path) -> list[dict[str, str]]:
  """The rows of results.csv."""
  with open(directory / "results.csv", newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def losses(rows: list[dict[str, str]], **where: str) -> list[float]:
  """The losses in results.csv of the trials that are done and have these values."""
  return [float(row["loss"]) for row in rows
          if row["status"] == "done" and all(row[key] == value for key, value in where.items())]


class Page(HTMLParser):
  """report.html, read back: its headings, tables and figures, and what it would load."""

  LOADING = ("src", "href", "srcset", "data", "poster", "action")  # attributes that name a file or an address
  VOID = ("meta", "br", "img", "hr", "input", "line", "path", "rect")

  def __init__(self, directory: Path):
    super().__init__()
    self.text = (directory / "report.html").read_text(encoding="utf-8")
    self.headings: list[str] = []
    self.tables: list[list[list[str]]] = []  # rows of cells, the headings first
    self.figures: list[dict] = []  # label of the still picture, specifications of the charts
    self.loads: list[str] = []
    self.open: list[str] = []  # elements that are open
    self.mismatched: list[str] = []  # end tags that close no open element, and elements that stay open
    self.styles = ""
    self.feed(self.text)
    self.close()
    self.mismatched += self.open
    self.loads += re.findall(r"@import|url\([^)]*\)", self.styles)

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    values = dict(attrs)
    self.loads += [str(values[name]) for name in self.LOADING if name in values]
    if tag not in self.VOID:
      self.open.append(tag)
    if tag in ("h1", "h2", "h3"):
      self.headings.append("")
    elif tag == "table":
      self.tables.append([])
    elif tag == "tr":
      self.tables[-1].append([])
    elif tag in ("td", "th"):
      self.tables[-1][-1].append("")
    elif tag == "figure":
      self.figures.append({"label": "", "charts": []})
    elif values.get("role") == "img" and "svg" not in self.open:
      self.figures[-1]["label"] = values.get("aria-label", "")
    elif tag == "script" and values.get("type") == "application/json":
      self.figures[-1]["charts"].append(None)

  def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.loads += [str(value) for name, value in attrs if name in self.LOADING]

  def handle_endtag(self, tag: str) -> None:
    if self.open and self.open[-1] == tag:
      self.open.pop()
    elif tag not in self.VOID:
      self.mismatched.append(tag)

  def handle_data(self, data: str) -> None:
    inside = self.open[-1] if self.open else ""
    if inside in ("h1", "h2", "h3"):
      self.headings[-1] += data
    elif inside in ("td", "th"):
      self.tables[-1][-1][-1] += data
    elif inside == "style":
      self.styles += data
    elif inside == "script" and self.figures and self.figures[-1]["charts"][-1:] == [None]:
      self.figures[-1]["charts"][-1] = json.loads(data)

"""Reports of sweeps, read back: findings, results.csv and the page."""

import base64
import csv
import re
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


class Page:
  """report.html and the figures in it."""

  def __init__(self, directory: Path):
    self.text = (directory / "report.html").read_text(encoding="utf-8")
    self.figures = [base64.b64decode(x) for x in re.findall(r'src="data:image/png;base64,([^"]+)"', self.text)]

"""The report as one HTML file with its figures inside; it loads nothing from the network."""

from pathlib import Path

import jinja2

from lora_exp.report.page.document import Report

TEMPLATE = Path(__file__).with_name("page.html")


def html(report: Report) -> str:
  """The page as text."""
  environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
  template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
  return template.render(report=report)

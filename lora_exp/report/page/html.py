"""The report as one HTML file with its figures, style and script inside; it loads nothing from the network."""

from functools import cache
from pathlib import Path

import jinja2
import vl_convert

from lora_exp.report.page.compared import COMMAND
from lora_exp.report.page.document import Report

FOLDER = Path(__file__).parent  # of page.html, page.css and page.js


def html(report: Report) -> str:
  """The page as text."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=jinja2.select_autoescape(["html"]),  # page.css and page.js are included as they are
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("page.html").render(report=report, command=COMMAND, vega=vega_script())


@cache
def vega_script() -> str:
  """The bundle of Vega, Vega-Lite and Vega-Embed that `vl_convert` carries, about 0.9 MB. Making it takes seconds."""
  return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")

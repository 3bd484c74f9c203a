"""The report as one HTML file with its figures, style and script inside; it loads nothing from the network."""

from functools import cache
from importlib.metadata import version
from pathlib import Path

import jinja2
import vl_convert

from lora_exp.config.errors import DiskError, InputError
from lora_exp.report.page.compared import COMMAND
from lora_exp.report.page.document import Report
from lora_exp.runtime.cache import fingerprint, get_or_make

BUNDLE = "vega.js"
FOLDER = Path(__file__).parent  # of page.html, page.css and page.js


def html(report: Report, cache_dir: str | None = None) -> str:
  """The page as text. The script that all pages share is cached in `cache_dir`."""
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(FOLDER),
    autoescape=jinja2.select_autoescape(["html"]),  # page.css and page.js are included as they are
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  page = environment.get_template("page.html")
  return page.render(report=report, command=COMMAND, vega=vega_script(cache_dir))


def vega_script(cache_dir: str | None = None) -> str:
  """The bundle of Vega, Vega-Lite and Vega-Embed, 0.9 MB. It is cached in `cache_dir`, if that can be written."""
  if cache_dir is None:
    return _bundle()
  try:
    entry = get_or_make(cache_dir, "page", fingerprint(vl_convert=version("vl-convert-python")), _write_bundle)
  except (InputError, DiskError):
    return _bundle()
  return (entry / BUNDLE).read_text("utf-8")


def _write_bundle(directory: Path) -> None:
  (directory / BUNDLE).write_text(_bundle(), "utf-8")


@cache
def _bundle() -> str:
  """Bundles the scripts that `vl_convert` contains, which takes seconds."""
  return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script")

"""`task=report run=SWEEP_DIR`: writes results.csv, plots/*.png, report.md and report.html from a sweep's files."""

from pathlib import Path

from lora_exp.config import Config, InputError
from lora_exp.report.page.terminal import show
from lora_exp.report.sweep_report import make_report
from lora_exp.runtime.console import phase


def run(cfg: Config) -> Path:
  """Writes the report of the sweep in `cfg.run` and shows it. Raises InputError if `cfg.run` holds no runs."""
  if cfg.run is None:
    raise InputError("run=null: task=report needs the directory of a sweep, such as outputs/sweeps/DAY/TIME-NAME")
  page = Path(cfg.run) / "report.html"
  with phase("write the report"):
    report = make_report(page.parent, cfg.report.metric, cfg.report.margin, cfg.cache)
  show(report, page.relative_to(Path.cwd()) if page.is_relative_to(Path.cwd()) else page)
  return page

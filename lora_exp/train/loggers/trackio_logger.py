"""Trackio: a local database in TRACKIO_DIR, by default ~/.cache/huggingface/trackio. `trackio show` displays it."""

from collections.abc import Callable, Mapping
from typing import Any

from lora_exp.train.logged_run import LoggedRun, named_values


def open_run(run: LoggedRun, warn: Callable[[str], None]) -> "TrackioWriter":
  """Starts or continues the run, which is named by its id, because trackio continues a run by its name."""
  import trackio
  import trackio.run
  import trackio.utils

  for module in (trackio, trackio.run, trackio.utils):  # trackio has no setting for this
    vars(module)["print"] = _print_nothing
  return TrackioWriter(
    trackio.init(
      project=run.project, name=run.id, group=run.group, config=dict(run.config), resume="allow", embed=False,
      auto_log_gpu=False, auto_log_cpu=False,
    )
  )  # fmt: skip


def _print_nothing(*values: Any, **options: Any) -> None:
  """Replaces `print`, whose lines would break the progress bar."""


class TrackioWriter:
  """Writes to one run of trackio."""

  def __init__(self, run: Any):
    self.run = run

  def log(self, row: Mapping[str, Any]) -> None:
    self.run.log({"tokens": row.get("tokens"), **named_values(row)}, step=row["step"])

  def summary(self, values: Mapping[str, Any]) -> None:
    """Trackio has no summary of a run."""

  def finish(self, exit_code: int) -> None:
    self.run.finish()

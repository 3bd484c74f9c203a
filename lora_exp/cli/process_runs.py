"""One command in several processes: process 0 creates the run directory, the others write to a scratch directory."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.cli.claim import Claim
from lora_exp.cli.command_line import CommandLine
from lora_exp.cli.error_report import report_error
from lora_exp.config.errors import BUG, LoraExpError
from lora_exp.config.schema import DistributedConfig
from lora_exp.runtime.console import release_errors, show_error, show_only_errors
from lora_exp.runtime.run_files import CHECKPOINTS

if TYPE_CHECKING:
  from lora_exp.runtime.process_group import ProcessGroup

SECONDS = 600  # that process 0 has to create the run directory


def processes_of(line: CommandLine) -> DistributedConfig | None:
  """The settings of the processes that the command runs in; None for one process."""
  if line.shows_only or not line.jobs or line.jobs[0].distributed.coordinator is None:
    return None
  return line.jobs[0].distributed


class ProcessRun:
  """The part of a run that this process does."""

  def __init__(self, line: CommandLine, settings: DistributedConfig, full_error: bool):
    self.line, self.full_error = line, full_error
    self.scratch: Path | None = None
    self.group: ProcessGroup = import_module("lora_exp.runtime.process_group").connect(settings, show_error)
    self.group.watch(self._report_failure)
    if not self.group.writes:
      show_only_errors(f"process {self.group.index}: ")

  def run(self, run: Callable[[Callable[[], Claim | None]], int], reason: Callable[[], str]) -> int:
    """Returns the exit code of `run(claimed)`, where `claimed()` is the directory to write to.

    The other processes receive the code, and the `reason` of a failure. Only process 0 shows an error that all of them
    have.
    """
    cfg, code, text = self.line.jobs[0], BUG, ""
    try:
      self.group.require_same_settings(cfg, cfg.distributed.timeout)
      with self._claimed() as claim:
        code = run(lambda: claim)
        text = reason()
    except (LoraExpError, OSError) as error:
      code, text = report_error(error, self.full_error), str(error)
    finally:
      same = self.group.end(code, text or "it was interrupted, or there is a bug")
      release_errors(shown=not same)
      self.group.leave()
    return code

  @contextmanager
  def _claimed(self) -> Iterator[Claim | None]:
    """The directory that this process writes to; None for a resumed run, in its own directory."""
    if self.group.writes:
      claim = self.line.claim()
      self.group.publish("directory", str(self.line.resumed if claim is None else claim.path))
      yield claim
      return
    directory = self.group.read("directory", SECONDS)
    with tempfile.TemporaryDirectory(prefix="lora_exp-") as scratch:
      path = self.scratch = Path(scratch)
      (path / CHECKPOINTS).symlink_to(Path(directory).absolute() / CHECKPOINTS)  # all write checkpoints together
      yield Claim(path, None)

  def _report_failure(self, error: LoraExpError) -> None:
    """Shows that another process has failed, before this one ends."""
    release_errors(shown=True)
    show_error(error)
    if self.scratch is not None:
      shutil.rmtree(self.scratch, ignore_errors=True)

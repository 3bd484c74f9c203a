"""The one entry point: check the command line, claim a directory, let Hydra compose, run the task, map the outcome.

Hydra ends with 1 and a traceback whatever went wrong. Here a job catches its own error, so that a multirun goes on, and
the process ends with the code that the error carries.
"""

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lora_exp import __version__
from lora_exp.config import Config, InputError, LoraExpError, StoppedError
from lora_exp.config.commandline import CommandLine, check_command_line
from lora_exp.config.errors import BUG, DONE
from lora_exp.config.overrides import parse
from lora_exp.config.rundir import cannot_write, is_disk_error, locked
from lora_exp.config.saved import job_config, save
from lora_exp.screen import show, show_error, show_warning

INTERRUPTED = 130  # as a shell reports Ctrl-C
MOST_LINES = 20  # of problems on the screen
sys.path.append(str(Path(__file__).parent / "_plugins"))  # where Hydra finds our sweeper and launcher
logging.getLogger("lora_exp").addHandler(logging.NullHandler())  # tasks without a log: no traceback on the screen

Task = Callable[[Config, Path], object]
TASKS: dict[str, Task] = {
  "train": lambda cfg, run_dir: train(cfg, run_dir),
  "generate": lambda cfg, _: task("lora_exp.generate", "run")(cfg),
  "evaluate": lambda cfg, _: task("lora_exp.evaluate", "run")(cfg),
  "merge": lambda cfg, _: task("lora_exp.export", "run")(cfg),
  "export": lambda cfg, _: task("lora_exp.export", "run")(cfg),
  "plan": lambda cfg, _: task("lora_exp.plan", "run")(cfg),
  "report": lambda cfg, _: task("lora_exp.report.sweep", "run")(cfg),
}


def main() -> None:
  """`python -m lora_exp` and `lora-exp`: ends the process with its exit code."""
  sys.exit(run(sys.argv[1:]))


def run(argv: Sequence[str]) -> int:
  """Runs one command line and returns its exit code."""
  if "--version" in argv:
    show(f"lora_exp {__version__}")
    return DONE
  full_error = os.environ.get("HYDRA_FULL_ERROR") == "1"
  try:
    return Session(check_command_line(argv), full_error).run()
  except (LoraExpError, OSError) as error:
    return report(error, full_error)
  except KeyboardInterrupt:
    show("interrupted")
    return INTERRUPTED


def task(module: str, function: str) -> Callable[..., object]:
  """The function of a task; its module, and jax with it, is imported now and not before."""
  found: Callable[..., object] = getattr(import_module(module), function)
  return found


def train(cfg: Config, run_dir: Path) -> None:
  """Locks the run directory, writes config.yaml, and trains.

  A run that cannot go on as asked keeps the config that it had.
  """
  with locked(run_dir):
    before = save(cfg, run_dir)
    try:
      task("lora_exp.train", "run")(cfg, run_dir)
    except InputError:
      if before is not None:
        save(before, run_dir)
      raise


def report(error: LoraExpError | OSError, full_error: bool) -> int:
  """Shows an error without its traceback (HYDRA_FULL_ERROR=1: with it) and returns its exit code."""
  if full_error:
    traceback.print_exception(error)
  if isinstance(error, InputError) and len(error.problems) > MOST_LINES:
    more = len(error.problems) - MOST_LINES
    error = InputError([*error.problems[:MOST_LINES], f"and {more} more"])
  elif isinstance(error, OSError):
    if error.filename is None and not is_disk_error(error):  # no file of the user's: a bug
      if not full_error:
        traceback.print_exception(error)
      return BUG
    error = cannot_write(error, Path(os.fsdecode(error.filename or ".")))
  if isinstance(error, StoppedError):
    show_warning(str(error))
  else:
    show_error(error)
  return error.code


@contextmanager
def hydra_arguments(argv: list[str]) -> Iterator[None]:
  """`sys.argv` as Hydra is to read it."""
  before = sys.argv
  sys.argv = [before[0], *argv]
  try:
    yield
  finally:
    sys.argv = before


@contextmanager
def raising() -> Iterator[None]:
  """Hydra raises what it would print."""
  before = os.environ.get("HYDRA_FULL_ERROR")
  os.environ["HYDRA_FULL_ERROR"] = "1"
  try:
    yield
  finally:
    if before is None:
      del os.environ["HYDRA_FULL_ERROR"]
    else:
      os.environ["HYDRA_FULL_ERROR"] = before


class Session:
  """One checked command line on its way through Hydra."""

  def __init__(self, line: CommandLine, full_error: bool):
    self.line, self.full_error = line, full_error
    self.codes: list[int] = []  # of the jobs, in order
    self.stopped = False  # by a signal: no further job is started

  def run(self) -> int:
    """Claims the directory, starts Hydra, and returns the exit code."""
    main = hydra.main(version_base="1.3", config_path=str(self.line.conf), config_name=self.line.config_name)(self.job)
    if self.line.shows:
      with hydra_arguments(self.line.hydra_argv(None)):
        main()
      return DONE
    if self.line.note:
      show_warning(self.line.note)
    claim = self.line.claim()
    with ExitStack() as stack:
      directory = claim.path if claim else None
      if directory is None and self.line.multirun:  # Hydra writes multirun.yaml; other tasks leave nothing behind
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
      try:
        stack.enter_context(hydra_arguments(self.line.hydra_argv(directory)))
        stack.enter_context(raising())
        main()
        if claim and self.line.multirun and not self.stopped:
          self.summarise(claim.path)
      except KeyboardInterrupt:
        self.codes.append(INTERRUPTED)
        show("interrupted")
      finally:
        if claim and (not self.codes or set(self.codes) <= {InputError.code, INTERRUPTED}):
          claim.undo()
    return self.exit_code()

  def summarise(self, directory: Path) -> None:
    """The report of a sweep, also where some of its runs failed."""
    try:
      task("lora_exp.report.sweep", "run")(Config(task="report", run=str(directory)))
    except InputError as error:  # no run came so far that there is something to report
      show_warning(str(error))

  def exit_code(self) -> int:
    """That of the one job; of a multirun 1 if any failed, unless it was stopped or interrupted."""
    if INTERRUPTED in self.codes:
      return INTERRUPTED
    if not self.line.multirun:
      return self.codes[0]
    return StoppedError.code if self.stopped else BUG if any(self.codes) else DONE

  def pack(self, composed: Sequence[tuple[DictConfig, Path]], width: int | None) -> list[int]:
    """The packed launcher's: all jobs of a sweep, in as few programs as they can share; returns their codes."""
    jobs = []
    for cfg, directory in composed:
      overrides = parse(cfg.hydra.overrides.task, None)[0]
      jobs.append((cfg.hydra.job.num, job_config(cfg, overrides), directory))
    packed = import_module("lora_exp.sweep.packed")
    points = [packed.Job(*job) for job in jobs]
    try:
      packed.train(points, width, packed.Ledger(Path(composed[0][0].hydra.sweep.dir)))
    except StoppedError as error:
      self.stopped = True
      self.codes.append(report(error, self.full_error))
    codes = [DONE if point.error is None else point.error.code for point in points]
    self.codes += codes
    return codes

  def job(self, composed: DictConfig) -> None:
    """Hydra's task function: one run; its outcome goes into `codes`."""
    node = HydraConfig.get()
    if self.stopped:
      return
    if self.line.multirun:
      show(f"run {node.job.num}: {' '.join(node.overrides.task)}")
    try:
      cfg = job_config(composed, parse(node.overrides.task, None)[0])
      TASKS[cfg.task](cfg, Path(node.runtime.output_dir))
      self.codes.append(DONE)
    except (LoraExpError, OSError) as error:
      logging.getLogger("lora_exp").error("%s", error, exc_info=True)
      self.codes.append(report(error, self.full_error))
      self.stopped = isinstance(error, StoppedError) and cfg.train.stop_at is None
    except Exception:  # a bug: told in full, and the other runs of a multirun go on
      logging.getLogger("lora_exp").exception("bug")
      traceback.print_exc()
      self.codes.append(BUG)


if __name__ == "__main__":
  main()

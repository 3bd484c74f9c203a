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
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from lora_exp import __version__
from lora_exp.cli.command_line import CommandLine, check_command_line
from lora_exp.cli.overrides import parse
from lora_exp.cli.saved_config import check_same, job_config, save
from lora_exp.config import Config, InputError, LoraExpError, ReachedError, StoppedError
from lora_exp.config.errors import BUG, DONE
from lora_exp.runtime.console import share, show, show_error, show_warning
from lora_exp.runtime.run_directory import is_disk_error, locked, write_error
from lora_exp.sweep.ledger import Ledger, Outcome, show_failures

INTERRUPTED = 130  # as a shell reports Ctrl-C
MOST_LINES = 20  # of problems on the screen
sys.path.append(str(Path(__file__).parent / "cli" / "hydra_plugins_path"))  # where Hydra finds our sweeper and launcher
logging.getLogger("lora_exp").addHandler(logging.NullHandler())  # tasks without a log: no traceback on the screen

Task = Callable[[Config, Path], object]
TASKS: dict[str, Task] = {
  "train": lambda cfg, run_dir: train(cfg, run_dir),
  "generate": lambda cfg, _: task("lora_exp.tasks.generate", "run")(cfg),
  "evaluate": lambda cfg, _: task("lora_exp.tasks.evaluate", "run")(cfg),
  "merge": lambda cfg, _: task("lora_exp.tasks.export", "run")(cfg),
  "export": lambda cfg, _: task("lora_exp.tasks.export", "run")(cfg),
  "inspect": lambda cfg, _: task("lora_exp.tasks.inspect", "run")(cfg),
  "plan": lambda cfg, _: task("lora_exp.tasks.plan", "run")(cfg),
  "report": lambda cfg, _: task("lora_exp.tasks.report", "run")(cfg),
  "dashboard": lambda cfg, _: task("lora_exp.tasks.dashboard", "run")(cfg),
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
    plan = import_module("lora_exp.train.plan").make_plan(cfg)
    before = save(plan.saved_cfg, run_dir)
    try:
      task("lora_exp.train.pack", "run")(plan, run_dir)
    except InputError:
      if before is not None:
        save(before, run_dir)
      raise


def begin(number: int, cfg: Config, directory: Path, ledger: Ledger) -> Ledger:
  """A run of a sweep goes on from its checkpoint if it has one, wherever it was begun; the ledger is told."""
  if import_module("lora_exp.train.checkpoint").steps(directory):
    cfg.train.resume = str(directory)
  else:
    (directory / "samples.jsonl").unlink(missing_ok=True)
  ledger.add("started", trial=number, resumed=cfg.train.resume is not None)
  return ledger


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
    error = write_error(error, Path(os.fsdecode(error.filename or ".")))
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
    self.outcomes: dict[int, Outcome] = {}  # of the jobs, by number
    self.interrupted = False
    self.stopped = False  # by a signal: no further job is started

  def __getstate__(self) -> dict[str, object]:
    """What a copy that runs one job in another process needs: not the configs of all jobs."""
    return {**self.__dict__, "line": replace(self.line, jobs=[]), "outcomes": {}}

  def __setstate__(self, state: dict[str, object]) -> None:
    """A copy, which may share the terminal with others."""
    self.__dict__.update(state)
    share()

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
        self.interrupted = True
        again = f"; go on with the same command and hydra.sweep.dir={directory}" if claim and self.line.multirun else ""
        show(f"interrupted{again}")
      finally:
        if claim and all(outcome.code == InputError.code for outcome in self.outcomes.values()):
          claim.undo()
    if self.line.multirun:
      show_failures(list(self.outcomes.values()), directory)
    return self.exit_code()

  def summarise(self, directory: Path) -> None:
    """The report of a sweep, also where some of its runs failed."""
    try:
      task("lora_exp.tasks.report", "run")(Config(task="report", run=str(directory)))
    except InputError as error:  # no run came so far that there is something to report
      show_warning(str(error))

  def exit_code(self) -> int:
    """That of the one job; of a multirun 1 if any failed, unless it was interrupted or stopped by a signal."""
    codes = {outcome.code for outcome in self.outcomes.values()}
    if self.interrupted:
      return INTERRUPTED
    if not self.line.multirun:
      return codes.pop()
    if self.stopped:
      return StoppedError.code
    return BUG if codes - {DONE, StoppedError.code} else max(codes, default=DONE)

  def check_same(self, directory: Path) -> None:
    """Raises InputError where the sweep in `directory`, which is to go on, was begun with other jobs."""
    check_same((n, cfg, directory / str(n)) for n, cfg in enumerate(self.line.jobs))

  def place(self, launcher: Launcher, jobs: Sequence[Sequence[str]], first: int, directory: Path) -> list[Outcome]:
    """The placed launcher's: has `launcher` run the jobs of the sweep in `directory`; returns how they ended."""
    placing = import_module("lora_exp.sweep.placed_launcher")
    runs = [Outcome(n, asked=" ".join(texts)) for n, texts in enumerate(jobs, first)]
    found: list[Outcome] = placing.launch(launcher, jobs, first, [[run] for run in runs], directory)
    self.outcomes |= {outcome.number: outcome for outcome in found}
    return found

  def pack(
    self, composed: Sequence[tuple[DictConfig, Path]], width: int | None, place: Callable[[object], Launcher] | None
  ) -> list[Outcome]:
    """The packed launcher's: trains all jobs in as few programs as they can share; returns how they ended.

    `place` makes the launcher that has a task called for each pack; None: they are trained here.
    """
    packs, node = import_module("lora_exp.sweep.packed_launcher"), composed[0][0].hydra
    jobs, runs = [], []
    for cfg, directory in composed:
      texts = cfg.hydra.overrides.task
      jobs.append((cfg.hydra.job.num, job_config(cfg, parse(texts, None)[0]), directory))
      runs.append(Outcome(cfg.hydra.job.num, asked=" ".join(texts)))
    sweep = packs.Packs(jobs, runs, width, Path(node.sweep.dir), bool(node.sweeper.get("repeat_failed")))
    found: list[Outcome] = sweep.train() if place is None else sweep.train_placed(place)
    if sweep.stopped is not None:
      self.stopped = True
      show_warning(str(sweep.stopped))
    self.outcomes |= {outcome.number: outcome for outcome in found}
    return found

  def job(self, composed: DictConfig) -> Outcome:
    """Hydra's task function: one run. How it ended is kept, and returned too, as this may be a copy elsewhere."""
    node = HydraConfig.get()
    run = Outcome(node.job.num if self.line.multirun else 0, asked=" ".join(node.overrides.task))
    if self.stopped:
      return replace(run, code=StoppedError.code, reason="not begun")
    if self.line.multirun:
      show(f"run {run.number}: {run.asked}")
    with chdir(node.runtime.cwd):  # where it was typed, also in a process that was started elsewhere
      outcome = self.outcomes[run.number] = self.attempt(composed, node, run)
    return outcome

  def attempt(self, composed: DictConfig, node: HydraConf, run: Outcome) -> Outcome:
    """Runs one job, of a sweep unless it has ended before, and tells the sweep's ledger; returns how it ended."""
    directory, ledger = Path(node.runtime.output_dir), None
    try:
      cfg = job_config(composed, parse(node.overrides.task, None)[0])
      if self.line.multirun and cfg.task == "train":
        check_same([(run.number, cfg, directory)])
        before = Ledger(Path(node.sweep.dir))
        past = before.outcome(run.number, run.asked)
        if past and not (past.code and node.sweeper.get("repeat_failed")):
          show(f"run {run.number}: ended before")
          return past
        ledger = begin(run.number, cfg, directory, before)
      TASKS[cfg.task](cfg, directory)
    except (LoraExpError, OSError) as error:
      logging.getLogger("lora_exp").error("%s", error, exc_info=True)
      run = replace(run, code=report(error, self.full_error), reason=str(error))
      self.stopped = isinstance(error, StoppedError) and not isinstance(error, ReachedError)
    except Exception as error:  # a bug: told in full, and the other runs of a multirun go on
      logging.getLogger("lora_exp").exception("bug")
      traceback.print_exc()
      run = replace(run, code=BUG, reason=f"a bug: {type(error).__name__}: {error}")
    if ledger is not None:
      ledger.end(run)
    return run


if __name__ == "__main__":
  main()

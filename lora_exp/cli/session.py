"""Runs one checked command line through Hydra: claims the directory, runs the jobs, collects their outcomes.

`hydra.main` exits with 1 and a traceback for every error. Here each job catches its own error, so a multirun continues,
and the process exits with the code of the error.
"""

import logging
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, chdir, nullcontext
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from lora_exp.cli.claim import Claim
from lora_exp.cli.command_line import CommandLine
from lora_exp.cli.error_report import report_error
from lora_exp.cli.hydra_environment import (
  config_store_not_copied,
  files_measured,
  hydra_arguments,
  inherited_files_hidden,
  raising_hydra_errors,
)
from lora_exp.cli.job_config import job_config
from lora_exp.cli.process_runs import ProcessRun, processes_of
from lora_exp.cli.tasks import run_task, task_descriptions
from lora_exp.config.credentials import without_secrets
from lora_exp.config.errors import BUG, DONE, DiskError, InputError, LoraExpError, ReachedError, StoppedError
from lora_exp.config.override_grammar import parse, quoted
from lora_exp.config.schema import Config, ReportConfig
from lora_exp.runtime.console import log_opened, share, show, show_warning
from lora_exp.runtime.console_text import time_left
from lora_exp.runtime.display_paths import typed_path
from lora_exp.runtime.output_stream import without_waiting
from lora_exp.runtime.run_files import LEDGER, SAMPLES
from lora_exp.runtime.run_log import keep_log_off_stderr, log_file, loggers_restored
from lora_exp.runtime.saved_config import require_same_configs
from lora_exp.sweep.ledger import Ledger, Outcome, show_failures
from lora_exp.sweep.sweep_run import PackedSweep, SweepRun
from lora_exp.train.stop_signals import stop_signals

INTERRUPTED = 130  # exit code after Ctrl-C, as in a shell
HELP_WIDTH = 110  # columns of the list of tasks in --help
PLUGINS_PATH = Path(__file__).parent / "hydra_plugins_path"
if str(PLUGINS_PATH) not in sys.path:
  sys.path.append(str(PLUGINS_PATH))  # where Hydra finds our sweepers and launchers


class Session:
  """Runs one command line. Hydra's plugins access it as the owner of the task function `run_job`."""

  def __init__(self, line: CommandLine, full_error: bool):
    self.line, self.full_error = line, full_error
    self.outcomes: dict[int, Outcome] = {}  # outcomes of finished jobs by number
    self.interrupted = False
    self.began = time.monotonic()
    self.stopped = False  # a signal arrived: no further job is started
    self.disk_shown = False

  def __getstate__(self) -> dict[str, object]:
    """The state of a copy that runs one job in another process, without the configs of all jobs."""
    return {**self.__dict__, "line": replace(self.line, jobs=[]), "outcomes": {}}

  def __setstate__(self, state: dict[str, object]) -> None:
    """Restores a copy, which shares the terminal with other processes."""
    self.__dict__.update(state)
    share()

  def run(self) -> int:
    """Claims the directory, starts Hydra, and returns the exit code. Training waits for no reader of its output."""
    trains = self.line.directory is not None or self.line.resumed
    processes = processes_of(self.line)
    with without_waiting() if trains else nullcontext():
      if processes is None:
        return self._run(self.line.claim)
      return ProcessRun(self.line, processes, self.full_error).run(self._run, self._reason)

  def _reason(self) -> str:
    """Why the job failed, or ''."""
    return " ".join(outcome.reason or "" for outcome in self.outcomes.values())

  def _run(self, claimed: Callable[[], Claim | None]) -> int:
    line = self.line
    hydra_main = hydra.main(version_base="1.3", config_path=str(line.conf), config_name=line.config_name)(self.run_job)
    if line.shows_only:
      arguments = [*line.hydra_argv(None), *_help_overrides(line)]
      with hydra_arguments(arguments), inherited_files_hidden(), files_measured(), config_store_not_copied():
        hydra_main()
      return DONE
    for warning in line.warnings:
      show_warning(warning)
    claim = claimed()
    with ExitStack() as stack:
      stack.enter_context(loggers_restored())
      directory = claim.path if claim else None
      if directory is None and line.multirun:  # Hydra writes multirun.yaml, which other tasks must not leave behind
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
      elif line.multirun and directory is not None:
        stack.enter_context(log_file(directory))
      try:
        stack.enter_context(hydra_arguments(line.hydra_argv(directory)))
        stack.enter_context(raising_hydra_errors())
        stack.enter_context(inherited_files_hidden())
        stack.enter_context(files_measured())
        hydra_main()
        if claim and line.multirun and not self.stopped:
          _report_sweep(claim.path, line.jobs[0].report if line.jobs else ReportConfig())
      except KeyboardInterrupt:
        self.interrupted = True
        again = ""
        if claim and line.multirun:
          again = f"; repeat the command with {typed_path('hydra.sweep.dir', claim.path)}"
        show(f"interrupted{again}")
      finally:
        single = (StoppedError.code, DiskError.code)
        without_results = (InputError.code, *(() if line.multirun else single))
        if claim and all(outcome.code in without_results for outcome in self.outcomes.values()):
          claim.undo()
    if line.multirun:
      show_failures(list(self.outcomes.values()), directory)
    return self._exit_code(directory)

  def _exit_code(self, directory: Path | None) -> int:
    """The code of a single job; for a multirun 1 if any job failed, unless it was interrupted or stopped."""
    codes = {outcome.code for outcome in self.outcomes.values()}
    if self.interrupted:
      resumable = self.line.multirun and directory is not None and (directory / LEDGER).is_file()
      return StoppedError.code if resumable else INTERRUPTED
    if not self.line.multirun:
      return codes.pop()
    if self.stopped:
      return StoppedError.code
    return BUG if codes - {DONE, StoppedError.code} else max(codes, default=DONE)

  # ---- called by the plugins in hydra_plugins_path

  def require_same_jobs(self, directory: Path) -> None:
    """Raises InputError if the sweep in `directory`, which is to be continued, was started with other jobs."""
    _require_same((n, cfg, directory / str(n)) for n, cfg in enumerate(self.line.jobs))

  def require_same_runs(self, composed: Mapping[int, DictConfig], directory: Path) -> None:
    """Raises InputError if a run of the sweep in `directory`, by number, was started with another config."""
    jobs = {n: job_config(cfg, parse(cfg.hydra.overrides.task)[0], directory) for n, cfg in composed.items()}
    _require_same((n, cfg, directory / str(n)) for n, cfg in jobs.items())

  def launch_placed(
    self, launcher: Launcher, jobs: Sequence[Sequence[str]], first: int, directory: Path
  ) -> list[Outcome]:
    """Runs the jobs of the sweep in `directory` with `launcher`, numbered from `first`; returns their outcomes."""
    remote_jobs = import_module("lora_exp.sweep.remote.remote_jobs")
    runs = [Outcome(n, overrides=" ".join(texts)) for n, texts in enumerate(jobs, first)]
    outcomes: list[Outcome] = remote_jobs.launch(launcher, jobs, first, [[run] for run in runs], directory)
    self.outcomes |= {outcome.number: outcome for outcome in outcomes}
    return outcomes

  def launch_packed(
    self,
    composed: Sequence[tuple[DictConfig, Path]],
    width: int | None,
    make_launcher: Callable[[object], Launcher] | None,
  ) -> list[Outcome]:
    """Trains all jobs in packs; returns their outcomes.

    `make_launcher` creates a launcher that runs each pack in another process; without it packs train in this process.
    """
    keep_log_off_stderr()
    jobs = []
    node = composed[0][0].hydra
    for cfg, run_dir in composed:
      texts = cfg.hydra.overrides.task
      job = job_config(cfg, parse(texts)[0], Path(node.sweep.dir))
      jobs.append(SweepRun(cfg.hydra.job.num, job, run_dir, " ".join(texts)))
    sweep = PackedSweep(Path(node.sweep.dir), width, bool(node.sweeper.get("repeat_failed")))
    if not self.outcomes:  # the first jobs of the sweep
      import_module("lora_exp.runtime.device").start_jax(jobs[0].cfg.cache)
    if make_launcher is None:
      self._show_disk_use(sweep.directory)
      packed_sweep = import_module("lora_exp.sweep.packs.packed_sweep")
      stopped = packed_sweep.train_packed(packed_sweep.plan_sweep(jobs, sweep), sweep)
      outcomes = packed_sweep.sweep_outcomes(jobs, sweep, stopped)
    else:
      run_remote_packs = import_module("lora_exp.sweep.remote.remote_packs").run_remote_packs
      outcomes, stopped = run_remote_packs(jobs, sweep, make_launcher), None
    if stopped is not None:
      self.stopped = True
      show_warning(str(stopped))
    self.outcomes |= {outcome.number: outcome for outcome in outcomes}
    return outcomes

  def _show_disk_use(self, directory: Path) -> None:
    """Shows once what the sweep takes on disk. Copies in other processes have no jobs and show nothing."""
    jobs = [cfg for cfg in self.line.jobs if cfg.task == "train"]
    if jobs and not self.disk_shown:
      self.disk_shown = True
      import_module("lora_exp.sweep.disk_use").show_disk_use(jobs, directory)

  # ---- one job

  def run_job(self, composed: DictConfig) -> Outcome:
    """Hydra's task function: runs one job. Stores its outcome, and returns it for copies in other processes."""
    node = HydraConfig.get()
    run = Outcome(node.job.num if self.line.multirun else 0, overrides=" ".join(node.overrides.task))
    if self.stopped:
      return replace(run, code=StoppedError.code, reason="not begun")
    if self.line.multirun:
      show(f"run {run.number}{self._progress(node)}: {_with_seed(run.overrides, composed)}")
    with chdir(node.runtime.cwd):  # the directory of the command, also in processes with another one
      outcome = self.outcomes[run.number] = self._attempt(composed, node, run)
    return outcome

  def _progress(self, node: HydraConf) -> str:
    """' of 12, about 3 min left', if the number of jobs is known."""
    if not str(node.sweeper.get("_target_")).endswith(".GridSweeper") or not self.line.jobs:
      return ""
    left = time_left(time.monotonic() - self.began, len(self.outcomes), len(self.line.jobs))
    return f" of {len(self.line.jobs)}{left}"

  def _attempt(self, composed: DictConfig, node: HydraConf, run: Outcome) -> Outcome:
    """Runs one job, unless a sweep has finished it before. Errors become outcomes and are written to the ledger."""
    directory, ledger = Path(node.runtime.output_dir), None
    keep_log_off_stderr()
    log_opened()
    try:
      sweep = Path(node.sweep.dir) if self.line.multirun else None
      cfg = job_config(composed, parse(node.overrides.task)[0], sweep)
      if self.line.multirun and cfg.task == "train":
        _require_same([(run.number, cfg, directory)])
        sweep_ledger = Ledger(Path(node.sweep.dir))
        sweep_ledger.reopen(run.number, directory)
        past = sweep_ledger.outcome(run.number, run.overrides)
        if past and not (past.code and node.sweeper.get("repeat_failed")):
          show(f"run {run.number}: ended before")
          return past
        self._show_disk_use(Path(node.sweep.dir))
        cfg = _begin_trial(run.number, cfg, directory, sweep_ledger)
        ledger = sweep_ledger
      if cfg.task == "train":
        with stop_signals() as stop:
          run_task(cfg, directory)
        self.stopped = stop.requested  # the run has ended, but no other one is to start
      else:
        run_task(cfg, directory)
    except (LoraExpError, OSError) as error:
      logging.getLogger("lora_exp").error("%s", without_secrets(traceback.format_exc()))
      run = replace(run, code=report_error(error, self.full_error), reason=without_secrets(str(error)))
      self.stopped = isinstance(error, StoppedError) and not isinstance(error, ReachedError)
    except Exception as error:  # a bug: shown in full; the other runs of a multirun continue
      text = without_secrets(traceback.format_exc())
      logging.getLogger("lora_exp").error("bug: %s", text)
      print(text, file=sys.stderr, end="")
      run = replace(run, code=BUG, reason=without_secrets(f"a bug: {type(error).__name__}: {error}"))
    if ledger is not None:
      ledger.end(run)
    return run


def _require_same(jobs: Iterable[tuple[int, Config, Path]]) -> None:
  """Raises InputError if a begun run (number, config, directory) has another config, or files of another content."""
  if moved := require_same_configs(jobs):
    import_module("lora_exp.train.moved_sources").require_equal_content(moved)


def _with_seed(overrides: str, composed: DictConfig) -> str:
  """The overrides of a run, and its seed if they do not set it."""
  is_set = any(text.startswith("seed=") for text in overrides.split())
  return overrides if is_set else f"{overrides} (seed {composed.get('seed')})".strip()


def _help_overrides(line: CommandLine) -> list[str]:
  """The override with the list of tasks, which the text of --help contains."""
  if "--help" not in line.flags:
    return []
  descriptions = task_descriptions()
  width = max(map(len, descriptions)) + 2
  lines = []
  for name, text in descriptions.items():
    first, *more = textwrap.wrap(text, HELP_WIDTH - width - 4)
    lines += [f"  {name:{width}}{first}", *(" " * (width + 2) + part for part in more)]
  return ["hydra.help.header=" + quoted("\n".join(lines).strip())]


def _begin_trial(number: int, cfg: Config, directory: Path, ledger: Ledger) -> Config:
  """Writes the start of a trial to the ledger. Returns its config, which resumes from a checkpoint if there is one."""
  checkpoint = import_module("lora_exp.train.records.checkpoint")
  if checkpoint.steps(directory):
    cfg = replace(cfg, train=replace(cfg.train, resume=str(directory)))
  else:
    (directory / SAMPLES).unlink(missing_ok=True)
  ledger.add("started", trial=number, resumed=cfg.train.resume is not None)
  return cfg


def _report_sweep(directory: Path, settings: ReportConfig) -> None:
  """Writes the report of a sweep, even if some of its runs failed."""
  try:
    run_task(Config(task="report", run=str(directory), report=settings), directory)
  except InputError as error:  # no run has results yet
    show_warning(str(error))

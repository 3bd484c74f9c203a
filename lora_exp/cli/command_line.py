"""Everything between the command line and Hydra: parse it, compose every job, check every setting, claim a directory.

    line = check_command_line(["lora.rank=4"])    raises every problem at once as InputError; creates nothing
    claim = line.claim()                          creates the run directory
    sys.argv[1:] = line.hydra_argv(claim.path)    Hydra composes the same config again and calls the task
"""

import argparse
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.cli.all_checks import all_problems
from lora_exp.cli.claim import Claim, claim_directory
from lora_exp.cli.compose import Composer, composer, conf_directory
from lora_exp.cli.fallback import find_fallback
from lora_exp.cli.flags import SHOW_ONLY, existing_directory, hydra_flags, parse_flags
from lora_exp.cli.hydra_errors import hydra_errors
from lora_exp.cli.job_config import job_config
from lora_exp.cli.job_directories import JobDirectories
from lora_exp.cli.override_names import credential_problems, several_values_problems
from lora_exp.config.allowed_values import value_at
from lora_exp.config.errors import InputError
from lora_exp.config.old_names import old_name_warning, rename_override
from lora_exp.config.override_grammar import parse, quoted
from lora_exp.config.schema import Config
from lora_exp.config.setting_names import opened
from lora_exp.runtime.console import progress
from lora_exp.runtime.run_files import LEDGER
from lora_exp.runtime.saved_config import MOVABLE
from lora_exp.sweep.remote.launcher_plugins import launcher_problems

EXECUTED = {  # settings whose files are run as Python -> the overrides that set them
  "eval.metric_file": re.compile(r"\+*eval(\.metric_file=|=.*metric_file)"),
  "harness_tasks": re.compile(r"\+*harness_tasks="),
}
HARNESS = re.compile(r"^harness=([^\[\"',]+(?:,[^\[\"',]+)+)$")
SET_BY_ADAPTER = ("lora.rank", "lora.alpha", "lora.targets", "lora.parameters", "lora.init", "lora.scaling",
                  "lora.method")  # by that in lora.init_from
MANY = 200  # jobs whose checks take some seconds
MAY_SWEEP = ("sweep=", "experiment=", "hydra.mode=")  # overrides that may start a multirun without -m


@dataclass(frozen=True)
class CommandLine:
  """A checked command line."""

  flags: list[str]  # in Hydra's long form
  overrides: list[str]
  conf: Path
  config_name: str
  shows_only: bool = False  # --help, --cfg and the like: nothing is run
  multirun: bool = False
  directory: Path | None = None  # requested directory of the run or sweep; None: no directory is created
  typed_directory: bool = False  # whether the directory was given on the command line
  warnings: list[str] = field(default_factory=list)
  jobs: list[Config] = field(default_factory=list)  # one per run

  @property
  def resumed(self) -> str | None:
    """The run directory that the job resumes, or None."""
    return None if self.multirun or not self.jobs else self.jobs[0].train.resume

  def claim(self) -> Claim | None:
    """Creates the directory of the run or sweep. Returns None if there is none to create."""
    return None if self.directory is None else claim_directory(self.directory, self.typed_directory, self.multirun)

  def hydra_argv(self, directory: Path | None) -> list[str]:
    """The arguments for `hydra.main`, with the run (or sweep) in `directory`."""
    key = _directory_key(self.multirun)
    if self.resumed:
      extra = [_directory_override(key, directory or Path(self.resumed)), "hydra.output_subdir=null"]
    else:
      extra = [] if directory is None else [_directory_override(key, directory)]
    kept = [text for text in self.overrides if not (extra and text.lstrip("+").startswith(f"{key}="))]
    return [*self.flags, *kept, *extra]


def _directory_key(multirun: bool) -> str:
  return "hydra.sweep.dir" if multirun else "hydra.run.dir"


def _directory_override(key: str, path: Path) -> str:
  """The override `key="path"`. Raises InputError if Hydra would parse the path as an interpolation."""
  if "${" in str(path):
    raise InputError(f"{path}: a directory name cannot contain ${{; choose another with hydra.run.dir=DIR")
  return f"{key}={quoted(str(path))}"


def check_command_line(argv: Sequence[str]) -> CommandLine:
  """Parses, composes and checks a command line; raises InputError with every problem. Creates nothing."""
  args = parse_flags(argv)
  if problems := credential_problems(args.overrides):
    raise InputError(problems)
  conf = conf_directory()
  if args.config_path is not None:
    conf = args.config_path = existing_directory("--config-path", args.config_path)
  if args.config_dir is not None:
    args.config_dir = existing_directory("--config-dir", args.config_dir)
  config_name = args.config_name or "config"
  shows_only = args.cfg is not None or any(getattr(args, name) for name in SHOW_ONLY)
  if shows_only and args.cfg is None:
    if args.info:  # it prints the composed config
      with composer(conf, config_name, args.config_dir) as composing:
        composing.compose([opened(rename_override(text)) for text in args.overrides], multirun=True)
    return CommandLine(hydra_flags(args), args.overrides, conf, config_name, shows_only=True)
  with composer(conf, config_name, args.config_dir) as composing:
    request = _compose_request(composing, args)
    if shows_only:
      return CommandLine(hydra_flags(args), request.texts, conf, config_name, shows_only=True)
    jobs = _checked_jobs(composing, request)
    directory = _wanted_directory(request, jobs)
  return CommandLine(
    hydra_flags(args), request.texts, conf, config_name, multirun=request.multirun, directory=directory,
    typed_directory=directory is not None and request.types(request.directory_key), jobs=jobs,
    warnings=[text for text in (old_name_warning(args.overrides), request.fallback_reason) if text],
  )  # fmt: skip


@dataclass(frozen=True)
class _Request:
  """The command line composed as one config; lists of values are not yet expanded into jobs."""

  typed: list[str]
  texts: list[str]  # those of an experiment's fallback, and `typed`
  overrides: list[Override]  # `texts`, parsed
  master: DictConfig
  multirun: bool
  fallback_reason: str | None

  @property
  def directory_key(self) -> str:
    return _directory_key(self.multirun)

  def types(self, key: str) -> bool:
    """Whether the setting `key` was given."""
    return any(override.key_or_group == key for override in self.overrides)


def _compose_request(composing: Composer, args: argparse.Namespace) -> _Request:
  """Composes the overrides in `args`, after those of the experiment's fallback if it applies."""
  texts = [opened(rename_override(text)) for text in args.overrides]
  may_sweep = args.multirun or any(text.startswith(MAY_SWEEP) for text in texts)
  if not may_sweep:  # several tasks are one value
    texts = [HARNESS.sub(r"harness=[\1]", text) for text in texts]
  overrides = composing.parse(texts, several=may_sweep)
  master = composing.compose(texts, multirun=True)
  multirun = args.cfg is None and (args.multirun or master.hydra.mode == RunMode.MULTIRUN)
  if may_sweep and not multirun and (problems := several_values_problems(overrides)):
    raise InputError(problems)
  fallback = find_fallback(master, overrides) if args.cfg is None else None
  if fallback is None:
    return _Request(texts, texts, overrides, master, multirun, None)
  typed, texts = texts, [*fallback.overrides, *texts]
  overrides = composing.parse(texts, several=may_sweep)
  return _Request(typed, texts, overrides, composing.compose(texts, multirun=True), multirun, fallback.reason)


def _checked_jobs(composing: Composer, request: _Request) -> list[Config]:
  """The config of each job. Raises InputError with the problems of all jobs, each once."""
  task_overrides = [override for override in request.overrides if not override.is_hydra_override()]
  jobs: list[Config] = []
  problems: list[str] = []
  if request.multirun:
    problems += launcher_problems(request.master.hydra)
    typed_directory = request.types(request.directory_key)
    sweep = Path(str(OmegaConf.select(request.master, request.directory_key))) if typed_directory else None
    hydra = [str(override.input_line) for override in request.overrides if override.is_hydra_override()]
    all_texts = composing.job_overrides(request.master, task_overrides)
    with progress("check the jobs", len(all_texts), "jobs") if len(all_texts) > MANY else nullcontext() as bar:
      directories = JobDirectories(request.master)
      for number, texts in enumerate(all_texts):
        overrides = parse(texts, composing.loader)[0]
        composed = composing.compose_job(hydra, overrides)
        problems += _add_job(jobs, composing, composed, overrides, sweep)
        problems += _pack_problems(composed)
        directories.add(number, composed, overrides)
        if bar is not None:
          bar.advance()
    problems += directories.problems
    problems += composing.sweep_problems(request.master, task_overrides, jobs)
  else:
    problems += _add_job(jobs, composing, request.master, task_overrides)
  problems += _directory_problems(request, jobs)
  for name, pattern in EXECUTED.items():
    if any(value_at(cfg, name) for cfg in jobs) and not any(pattern.match(text) for text in request.typed):
      problems.append(f"{name}: is executed, so only the command line can set it; remove it from the config file")
  if problems:
    reason = [request.fallback_reason] if request.fallback_reason else []
    raise InputError([*reason, *dict.fromkeys(problems)])
  return jobs


def _add_job(
  jobs: list[Config], composing: Composer, composed: DictConfig, overrides: Sequence[Override],
  sweep: Path | None = None,
) -> list[str]:  # fmt: skip
  """Appends one job, of the sweep in the directory `sweep`, to `jobs`; returns its problems."""
  try:
    cfg = job_config(composed, overrides, sweep)
  except InputError as error:
    return composing.with_file_names(error.problems, composed)
  jobs.append(cfg)
  problems = all_problems(cfg)
  if cfg.train.resume:
    problems = [f"{problem}{_moved_advice(problem)}" for problem in problems]
  if sweep is None or not (sweep / LEDGER).is_file():  # a sweep that was begun is continued by its command
    problems += _initial_adapter_problems(cfg, overrides)
  return [*problems, *_trial_axis_problems(cfg, str(composed.hydra.launcher.get("_target_")))]


def _initial_adapter_problems(cfg: Config, overrides: Sequence[Override]) -> list[str]:
  """Problems of settings that were given although the adapter in lora.init_from has its own."""
  if cfg.lora.init_from is None or cfg.run is not None or cfg.train.resume:
    return []
  given = [override for override in overrides if override.key_or_group in SET_BY_ADAPTER]
  return [f"{override.input_line}: the adapter in lora.init_from={cfg.lora.init_from} sets it; remove it"
          for override in given]


def _moved_advice(problem: str) -> str:
  """What to do if the file of a resumed run is missing, or ''."""
  setting = problem.partition("=")[0]
  missing = setting in MOVABLE and ("no such" in problem or "matches no file" in problem)
  return f"; if it moved, add {setting}=PATH: files with equal content are accepted" if missing else ""


def _trial_axis_problems(cfg: Config, launcher: str) -> list[str]:
  """Problems of settings that depend on whether several trials train together."""
  if cfg.train.on_nan == "rewind" and launcher.endswith(".PackedLauncher"):
    return ["train.on_nan=rewind: the trials of a pack share their batches; use train.on_nan=skip, or "
            "hydra/launcher=basic"]
  if cfg.mesh.trial == 1 or cfg.task != "train" or cfg.train.resume or launcher.endswith(".PackedLauncher"):
    return []
  return [f"mesh.trial={cfg.mesh.trial}: must be 1, because only hydra/launcher=packed trains several trials at once"]


def _pack_problems(composed: DictConfig) -> list[str]:
  """Problems of a job of a sweep whose launcher trains every job that it is given."""
  if composed.task == "train" or not str(composed.hydra.launcher.get("_target_")).endswith(".PackedLauncher"):
    return []
  return [f"task={composed.task}: hydra/launcher=packed only trains; add hydra/launcher=basic"]


def _directory_problems(request: _Request, jobs: Sequence[Config]) -> list[str]:
  """Problems with the directory of the run or sweep, given its jobs."""
  resumed = [cfg.train.resume for cfg in jobs if cfg.train.resume]
  other = _directory_key(not request.multirun)
  if request.types(other):
    owner = "a sweep" if request.multirun else "a single run"
    return [f"{other}: the directory of {owner} is {request.directory_key}; give that instead"]
  if request.multirun and any(cfg.distributed.coordinator for cfg in jobs):
    return ["distributed.coordinator: several processes can train a single run, but no sweep; remove it or -m"]
  if resumed and request.multirun:
    return ["train.resume: only a single run can be resumed; remove -m"]
  if resumed and request.types(request.directory_key):
    return [f"{request.directory_key}: a resumed run stays in its directory; remove it"]
  return []


def _wanted_directory(request: _Request, jobs: Sequence[Config]) -> Path | None:
  """The output directory of the run or sweep; None if no new run is trained."""
  if not any(cfg.task == "train" and not cfg.train.resume for cfg in jobs):
    return None
  with hydra_errors():
    return Path(str(OmegaConf.select(request.master, request.directory_key)))

"""Everything between the command line and Hydra: read it, compose every job, check every setting, claim a directory.

    line = check_command_line(["lora.rank=4"])    every problem at once as InputError; makes nothing
    claim = line.claim()                          makes the run directory
    sys.argv[1:] = line.hydra_argv(claim)         Hydra composes the same again and calls the task
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lora_exp.cli.compose import MOST_CHECKED, Composer, composer, conf_directory, hydra_errors
from lora_exp.cli.fallback import instead
from lora_exp.cli.launcher_options import launcher_problems
from lora_exp.cli.overrides import credentials, not_one_value, parse, quoted
from lora_exp.cli.saved_config import job_config
from lora_exp.config.checks import check
from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import Config
from lora_exp.runtime.run_directory import Claim, claim

SHOWING = ("help", "hydra_help", "info", "shell_completion")  # flags that print something and check nothing

SWEEPING = ("sweep=", "experiment=", "hydra.mode=")  # may start a multirun without -m


@dataclass
class CommandLine:
  """A command line that was checked."""

  flags: list[str]  # as Hydra takes them
  overrides: list[str]
  conf: Path
  config_name: str
  shows: bool = False  # --help, --cfg and the like: nothing is run
  multirun: bool = False
  directory: Path | None = None  # where the run, or the sweep, wants to be; None: it makes no directory
  typed_directory: bool = False
  note: str | None = None  # why another model is run than the experiment's
  jobs: list[Config] = field(default_factory=list)  # one for each run; of a large multirun the first MOST_CHECKED

  @property
  def resumed(self) -> str | None:
    """The run directory that the one job goes on in."""
    return None if self.multirun or not self.jobs else self.jobs[0].train.resume

  def claim(self) -> Claim | None:
    """Makes the directory of the run or sweep; None where there is none to make."""
    return None if self.directory is None else claim(self.directory, self.typed_directory, self.multirun)

  def hydra_argv(self, directory: Path | None) -> list[str]:
    """The arguments for `hydra.main`, with the run (or sweep) in `directory`."""
    key = "hydra.sweep.dir" if self.multirun else "hydra.run.dir"
    if self.resumed:
      extra = [setting(key, Path(self.resumed)), "hydra.output_subdir=null"]
    else:
      extra = [] if directory is None else [setting(key, directory)]
    kept = [text for text in self.overrides if not (extra and text.lstrip("+").startswith(f"{key}="))]
    return [*self.flags, *kept, *extra]


def setting(key: str, path: Path) -> str:
  """The override `key="path"`; a path that Hydra would take for an interpolation is refused."""
  if "${" in str(path):
    raise InputError(f"{path}: ${{ in a directory's name is not possible; choose another with hydra.run.dir=DIR")
  return f"{key}={quoted(str(path))}"


def check_command_line(argv: Sequence[str]) -> CommandLine:
  """Reads, composes and checks; raises InputError with every problem that was found. Makes nothing."""
  args = parse_flags(argv)
  if problems := credentials(args.overrides):
    raise InputError(problems)
  conf = conf_directory()
  if args.config_path is not None:
    conf = args.config_path = directory("--config-path", args.config_path)
  if args.config_dir is not None:
    args.config_dir = directory("--config-dir", args.config_dir)
  line = CommandLine(hydra_flags(args), args.overrides, conf, args.config_name or "config")
  line.shows = args.cfg is not None or any(getattr(args, name) for name in SHOWING)
  if line.shows and args.cfg is None:
    return line
  with composer(conf, line.config_name, args.config_dir) as composing:
    _compose(line, composing, multirun=args.multirun)
  return line


def _compose(line: CommandLine, composing: Composer, multirun: bool) -> None:
  may_sweep = multirun or any(text.startswith(SWEEPING) for text in line.overrides)
  overrides = composing.parse(line.overrides, several=may_sweep)
  master = composing.compose(line.overrides, multirun=True)
  line.multirun = not line.shows and (multirun or master.hydra.mode == RunMode.MULTIRUN)
  if may_sweep and not line.multirun and (problems := not_one_value(overrides)):
    raise InputError(problems)
  if line.shows:
    return
  if other := instead(master, overrides):
    line.overrides, line.note = [*other[0], *line.overrides], other[1]
    overrides = composing.parse(line.overrides, several=may_sweep)
    master = composing.compose(line.overrides, multirun=True)
  hydra = [str(o.input_line) for o in overrides if o.is_hydra_override()]
  task = [o for o in overrides if not o.is_hydra_override()]
  found: dict[str, None] = {}  # in order, each once
  if line.multirun:
    found |= dict.fromkeys(launcher_problems(master.hydra))
    for job in itertools.islice(composing.jobs(master, task), MOST_CHECKED):
      asked = parse(job, composing.loader)[0]
      found |= dict.fromkeys(_job(line, composing, composing.compose_job(hydra, asked), asked))
    found |= dict.fromkeys(composing.sweep_problems(master, task, line.jobs))
  else:
    found |= dict.fromkeys(_job(line, composing, master, task))
  found |= dict.fromkeys(_directory(line, master, [o.key_or_group for o in overrides]))
  if found:
    raise InputError([*([line.note] if line.note else []), *found])


def _job(line: CommandLine, composing: Composer, composed: DictConfig, overrides: Sequence[Override]) -> list[str]:
  """Adds one job to `line`; returns its problems."""
  try:
    cfg = job_config(composed, overrides)
    line.jobs.append(cfg)
    return [*check(cfg), *_trials_problems(cfg, str(composed.hydra.launcher.get("_target_")))]
  except InputError as error:
    return composing.located(error.problems, composed)


def _trials_problems(cfg: Config, launcher: str) -> list[str]:
  if cfg.mesh.trial == 1 or cfg.task != "train" or cfg.train.resume or launcher.endswith(".PackedLauncher"):
    return []
  return [f"mesh.trial={cfg.mesh.trial}: must be 1: only a sweep with hydra/launcher=packed has more trials to spread"]


def _directory(line: CommandLine, master: DictConfig, typed: list[str]) -> list[str]:
  """Settles where the run or sweep goes; returns what speaks against it."""
  key = "hydra.sweep.dir" if line.multirun else "hydra.run.dir"
  if line.multirun and any(cfg.train.resume for cfg in line.jobs):
    return ["train.resume: one run at a time can go on; remove -m"]
  if line.resumed:
    return [f"{key}: a resumed run stays in its directory; remove it"] if key in typed else []
  if any(cfg.task == "train" for cfg in line.jobs):
    with hydra_errors():
      line.directory = Path(str(OmegaConf.select(master, key)))
    line.typed_directory = key in typed
  return []


def directory(flag: str, value: str) -> Path:
  """The absolute directory that `flag` names."""
  path = Path(value).expanduser().absolute()
  if not path.is_dir():
    raise InputError(f"{flag}={value}: no such directory")
  return path


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
  """Hydra's own flags, in any order with the overrides."""
  parser = get_args_parser()
  flags = [flag for action in parser._actions for flag in action.option_strings]
  unknown = [f"{arg}: {_flag_advice(arg, flags)}" for arg in argv if arg.startswith("-") and not _is_flag(arg, flags)]
  if unknown:
    raise InputError(unknown)
  parser.exit_on_error = False
  try:
    args = parser.parse_intermixed_args(list(argv))
  except argparse.ArgumentError as error:
    raise InputError(f"{error}; lora-exp --hydra-help lists the flags") from error
  if args.experimental_rerun is not None:
    raise InputError("--experimental-rerun: loads a pickle, which can run any code; use train.resume=DIR")
  if args.resolve and not (args.cfg or args.help):
    raise InputError("--resolve: goes with --cfg, as --cfg job --resolve")
  shown = [name for name in ("run", "cfg", "multirun", "shell_completion", "info") if getattr(args, name)]
  if len(shown) > 1:
    raise InputError(f"--{', --'.join(shown)}: give one of them")
  return args


def _is_flag(arg: str, flags: list[str]) -> bool:
  return arg.partition("=")[0] in flags


def _flag_advice(arg: str, flags: list[str]) -> str:
  if "=" in arg or "." in arg:
    return f"settings have no dashes: {arg.lstrip('-')}"
  return f"no such flag; settings are written key=value, and --help shows how{did_you_mean(arg, flags)}"


def hydra_flags(args: argparse.Namespace) -> list[str]:
  """`args` without the overrides, spelt out for Hydra."""
  flags = []
  for name, value in vars(args).items():
    if name != "overrides" and value not in (None, False):
      flags += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
  return flags

"""Hydra's flags (`-m`, `--cfg`, `--config-dir`, …), which may be mixed with overrides in any order."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.setting_names import all_settings, suggestion

SHOW_ONLY = ("help", "hydra_help", "info", "shell_completion")  # flags that only print something
EXCLUSIVE = ("run", "cfg", "multirun", "shell_completion", "info")


def parse_flags(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the flags and overrides in `argv`. Raises InputError for flags that do not exist or cannot be combined."""
  parser = get_args_parser()
  flags = [flag for action in parser._actions for flag in action.option_strings]
  unknown = [arg for arg in argv if arg.startswith("-") and arg.partition("=")[0] not in flags]
  if unknown:
    raise InputError([f"{arg}: {_flag_advice(arg, flags)}" for arg in unknown])
  parser.exit_on_error = False
  try:
    args = parser.parse_intermixed_args(list(argv))
  except argparse.ArgumentError as error:
    raise InputError(f"{error}; lora-exp --hydra-help lists the flags") from error
  if args.experimental_rerun is not None:
    raise InputError("--experimental-rerun: loads a pickle, which can run any code; use train.resume=DIR")
  if args.resolve and not (args.cfg or args.help):
    raise InputError("--resolve: works only with --cfg, as in --cfg job --resolve")
  given = [name for name in EXCLUSIVE if getattr(args, name)]
  if len(given) > 1:
    raise InputError(f"--{', --'.join(given)}: give only one of them")
  return args


def _flag_advice(arg: str, flags: list[str]) -> str:
  if "=" in arg or "." in arg:
    return f"settings are written without dashes: {arg.lstrip('-')}"
  word = arg.lstrip("-").replace("-", "_")
  if any(name.rpartition(".")[2] == word for name, _ in all_settings()):
    return f"no such flag; settings are written key=value, without dashes{suggestion(word)}"
  return f"no such flag; settings are written key=value, and --help shows how{did_you_mean(arg, flags)}"


def hydra_flags(args: argparse.Namespace) -> list[str]:
  """The flags in `args`, without the overrides, in Hydra's long form."""
  flags = []
  for name, value in vars(args).items():
    if name != "overrides" and value not in (None, False):
      flags.append(f"--{name.replace('_', '-')}")
      if value is not True:
        flags.append(str(value))
  return flags


def existing_directory(flag: str, value: str) -> Path:
  """The absolute path of the directory that `flag` names. Raises InputError if there is none."""
  path = Path(value).expanduser().absolute()
  if not path.is_dir():
    raise InputError(f"{flag}={value}: no such directory")
  return path

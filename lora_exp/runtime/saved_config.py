"""The config.yaml of a run directory, which is written before training and read by tasks on the run."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config.conversion import to_config
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config, LoraConfig
from lora_exp.runtime.files import write_text_atomically
from lora_exp.runtime.run_directory import run_directory_problem
from lora_exp.runtime.run_files import CONFIG

# Settings of a command, not of the run. They are reset when a saved config is loaded.
COMMAND_SETTINGS: dict[str, Any] = {"task": "train", "run": None, "prompt": None, "prompt_file": None, "format": "peft",
                                    "out": None, "merge": {}, "report": {}, "fallback": [], "runs": None,
                                    "filter": {}, "clean": {}, "cache_limit": None, "harness": None,
                                    "harness_tasks": None, "harness_limit": None, "harness_shots": None,
                                    "export": {}, "verify": {}, "push": None}
# Settings that may change when a run is resumed. Only task=train resumes one.
CHANGEABLE = (*(COMMAND_SETTINGS.keys() - {"task"}), "cache", "logger", "sample", "mesh", "expectations",
              "eval.metric_file", "train.resume", "train.stop_at", "train.on_nan", "train.log_every",
              "train.eval_every", "train.save_every")
# Settings that name files. They may change when a run is resumed, if the content is equal
# (train/records/resume_checks.py).
MOVABLE = ("data.path", "data.eval_path", "retain.path", "retain.eval_path", "pretrain_data.path",
           "pretrain_data.eval_path", "model.weights", "model.tokenizer", "lora.init_from")
# Families that version 0.1.0 called llama and distinguished by `model.arch`.
ONCE_LLAMA = ("mistral", "qwen2", "qwen3", "gemma", "gemma3")


def save_config(cfg: Config, directory: Path) -> Config | None:
  """Writes all resolved settings to DIR/config.yaml. Returns the config that it replaces, if any."""
  file = directory / CONFIG
  previous = load_config(str(directory)) if file.is_file() else None
  values = asdict(cfg)
  values["train"]["resume"] = None  # a setting of the command
  write_text_atomically(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120))
  return previous


def load_config(directory: str, setting: str = "run") -> Config:
  """Loads the config of the run in `directory`, without the settings of its command.

  Raises InputError that names `setting` if there is no config, or if this version cannot read it.
  """
  if problem := run_directory_problem(setting, directory):
    raise InputError(problem)
  file = Path(directory) / CONFIG
  try:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
    raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
  if not isinstance(values, dict):
    raise InputError(f"{file}: contains no settings")
  try:
    cfg = to_config(values)
  except InputError as error:
    raise InputError([f"{file}: {problem}" for problem in error.problems]) from error
  cfg.train.resume = cfg.train.stop_at = None
  cfg.eval.metric_file = None  # code of whoever made the run, which is never executed
  return to_config({**asdict(cfg), **COMMAND_SETTINGS})


def require_same_configs(jobs: Iterable[tuple[int, Config, Path]]) -> None:
  """Raises InputError if the directory of a job (number, config, directory) has a run with another config."""
  problems = []
  for number, cfg, directory in jobs:
    if not (directory / CONFIG).is_file():
      continue
    if paths := [path for path, _, _ in changed_settings(load_config(str(directory)), cfg)]:
      moved = ", or link the old path to the new one" if set(paths) <= set(MOVABLE) else ""
      problems.append(
        f"hydra.sweep.dir={directory.parent}: run {number} was started with another {', '.join(paths)}; give the same "
        f"command again{moved}, or another directory"
      )
  if problems:
    raise InputError(problems)


def with_old_defaults(cfg: Config, directory: Path, alpha_typed: bool) -> Config:
  """`cfg` with the defaults of the version that began the sweep in `directory`, so that the same command continues it.

  These are lora.alpha=null, unless alpha was typed, and rows that split answers from prompts. They are taken from the
  run with the lowest number.
  """
  begun = [path.parent for path in directory.glob(f"*/{CONFIG}") if path.parent.name.isdecimal()]
  if not begun:
    return cfg
  first = load_config(str(min(begun, key=_number)))
  if not alpha_typed and cfg.lora.alpha == LoraConfig.alpha and first.lora.alpha is None:
    cfg = replace(cfg, lora=replace(cfg.lora, alpha=None))
  return replace(cfg, data=_with_packing(cfg.data, first.data), retain=_with_packing(cfg.retain, first.retain))


def _with_packing(data: Any, begun: Any) -> Any:
  """`data` with packing=stream if the run `begun` has it and `data` has packing=pack."""
  streams = data is not None and begun is not None and (data.packing, begun.packing) == ("pack", "stream")
  return replace(data, packing="stream") if streams else data


def _number(directory: Path) -> int:
  return int(directory.name)


def changed_settings(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
  """Returns (path, before, after) of every changed setting that a resumed run must not change."""
  old, new = _flat(asdict(before)), _flat(asdict(after))
  allowed = list(CHANGEABLE)
  if before.lora.parameters is not None:
    allowed.append("lora.rank")  # computed from the number of parameters
  if before.model.family == "llama" and after.model.family in ONCE_LLAMA:
    allowed.append("model.family")
  paths = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
  return [(path, old.get(path), new.get(path)) for path in paths if not _is_below(path, allowed)]


def _is_below(path: str, groups: Iterable[str]) -> bool:
  """Whether `path` is one of `groups` or inside one of them."""
  return any(f"{path}.".startswith(f"{group}.") for group in groups)


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested settings to dotted paths."""
  flat: dict[str, Any] = {}
  for key, value in node.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat

"""The config.yaml of a run directory, which is written before training and read by tasks on the run."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config.conversion import to_config
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config, DistributedConfig, LoraConfig, ModelConfig
from lora_exp.runtime.files import write_text_atomically
from lora_exp.runtime.run_directory import run_directory_problem
from lora_exp.runtime.run_files import CONFIG
from lora_exp.runtime.yaml_text import safe_load

# Settings of a command, not of the run. They are reset when a saved config is loaded.
COMMAND_SETTINGS: dict[str, Any] = {"task": "train", "run": None, "prompt": None, "prompt_file": None, "format": "peft",
                                    "out": None, "merge": {}, "report": {}, "fallback": [], "runs": None,
                                    "filter": {}, "clean": {}, "plan": {}, "cache_limit": None, "harness": None,
                                    "harness_tasks": None, "harness_limit": None, "harness_shots": None,
                                    "export": {}, "verify": {}, "push": None, "distributed": {}, "bench": {}}
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
RESIZED = ("width", "heads", "ff")  # sizes of model=minigpt that differ from those of version 0.1.0


def save_config(cfg: Config, directory: Path) -> Config | None:
  """Writes all resolved settings to DIR/config.yaml. Returns the config that it replaces, if any."""
  file = directory / CONFIG
  previous = load_config(str(directory)) if file.is_file() else None
  text = yaml.safe_dump(saved_settings(cfg), sort_keys=False, allow_unicode=True, width=120)
  write_text_atomically(file, text, durable=True)  # a checkpoint is of no use without it
  return previous


def saved_settings(cfg: Config) -> dict[str, Any]:
  """All settings of a run as nested dicts, without those of a command that resumes it."""
  values = asdict(cfg)
  values["train"]["resume"], values["distributed"] = None, asdict(DistributedConfig())
  return values


def load_config(directory: str, setting: str = "run") -> Config:
  """Loads the config of the run in `directory`, without the settings of its command.

  Raises InputError that names `setting` if there is no config, or if this version cannot read it.
  """
  if problem := run_directory_problem(setting, directory):
    raise InputError(problem)
  file = Path(directory) / CONFIG
  try:
    values = safe_load(file.read_text(encoding="utf-8"))
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


def require_same_configs(jobs: Iterable[tuple[int, Config, Path]]) -> list[tuple[int, Config, Path]]:
  """Raises InputError if the directory of a job (number, config, directory) has a run with another config.

  Returns the jobs of which only files have moved; whether their content is equal remains to be compared.
  """
  problems, moved = [], []
  for number, cfg, directory in jobs:
    if not (directory / CONFIG).is_file():
      continue
    changed = changed_settings(load_config(str(directory)), cfg)
    if paths := [path for path, *values in changed if path not in MOVABLE or None in values]:
      problems.append(
        f"hydra.sweep.dir={directory.parent}: run {number} was started with another {', '.join(paths)}; give the same "
        "command again, or another directory"
      )
    elif changed:
      moved.append((number, cfg, directory))
  if problems:
    raise InputError(problems)
  return moved


def with_old_defaults(cfg: Config, directory: Path, typed: Collection[str]) -> Config:
  """`cfg` with the defaults of the older version that started the sweep in `directory`, if an older one did.

  The same command then continues the sweep. The defaults are lora.alpha=null, the sizes and the pretraining of
  model=minigpt, and rows that split answers from prompts. They are taken from the run with the lowest number, unless
  the setting is one of `typed`.
  """
  begun = [path.parent for path in directory.glob(f"*/{CONFIG}") if path.parent.name.isdecimal()]
  if not begun:
    return cfg
  lowest = min(begun, key=_number)
  first = load_config(str(lowest))
  if not _lacks_settings(lowest / CONFIG):
    return cfg
  if "lora.alpha" not in typed and cfg.lora.alpha == LoraConfig.alpha and first.lora.alpha is None:
    cfg = replace(cfg, lora=replace(cfg.lora, alpha=None))
  cfg = replace(cfg, model=_with_sizes(cfg.model, first.model, typed))
  for name in ("data", "retain"):
    if f"{name}.packing" not in typed:
      cfg = replace(cfg, **{name: _with_packing(getattr(cfg, name), getattr(first, name))})
  return cfg


def _lacks_settings(file: Path) -> bool:
  """Whether a saved config, which can be loaded, lacks settings of this version, so that an older one wrote it."""
  saved = safe_load(file.read_text(encoding="utf-8"))
  current = saved_settings(to_config(saved))
  return not flat_settings(current).keys() <= flat_settings(saved).keys()


def _with_sizes(model: ModelConfig, begun: ModelConfig, typed: Collection[str]) -> ModelConfig:
  """`model` with RESIZED and the pretraining of `begun`, except for `typed` settings, if nothing else differs."""
  old, new = asdict(begun), asdict(model)
  others = [name for name in new if name not in (*RESIZED, "pretrain") and f"model.{name}" not in typed]
  if model.family != "minigpt" or any(old[name] != new[name] for name in others):
    return model
  sizes = {name: old[name] for name in RESIZED if f"model.{name}" not in typed}
  recipe = {name: old["pretrain"][name] for name in old["pretrain"] if f"model.pretrain.{name}" not in typed}
  return replace(model, **sizes, pretrain=replace(model.pretrain, **recipe))


def _with_packing(data: Any, begun: Any) -> Any:
  """`data` with packing=stream if the run `begun` has it and `data` has packing=pack."""
  streams = data is not None and begun is not None and (data.packing, begun.packing) == ("pack", "stream")
  return replace(data, packing="stream") if streams else data


def _number(directory: Path) -> int:
  return int(directory.name)


def changed_settings(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
  """Returns (path, before, after) of every changed setting that a resumed run must not change."""
  old, new = flat_settings(asdict(before)), flat_settings(asdict(after))
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


def flat_settings(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Flattens nested settings to dotted paths."""
  flat: dict[str, Any] = {}
  for key, value in node.items():
    if isinstance(value, dict) and value:
      flat |= flat_settings(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat

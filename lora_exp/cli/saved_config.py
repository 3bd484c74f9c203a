"""`run=DIR` and `train.resume=DIR`: the config saved in DIR, with only what was typed on top."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lora_exp.cli.overrides import GLOBAL_GROUPS
from lora_exp.config.checks import is_sweep, run_directory_problem
from lora_exp.config.conversion import shown, to_config
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config

FILE = "config.yaml"
# They belong to one command, not to a run.
ONCE: dict[str, Any] = {"task": "train", "run": None, "prompt": None, "prompt_file": None, "format": "peft",
                        "out": None, "merge": {}, "report": {}, "otherwise": []}
FREE = ("run", "cache", "prompt", "prompt_file", "logger", "sample", "mesh", "promises", "report", "train.resume",
        "train.stop_at", "train.log_every", "train.eval_every", "train.save_every")  # may change while a run goes on


def save(cfg: Config, directory: Path) -> Config | None:
  """Writes DIR/config.yaml: every setting, resolved, and nothing else. Returns the config it replaces, if any."""
  file = directory / FILE
  before = load(str(directory)) if file.is_file() else None
  values = asdict(cfg)
  values["train"]["resume"] = None  # it belongs to the command
  temporary = directory / f".{FILE}.tmp"
  temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
  temporary.replace(file)
  return before


def load(directory: str, path: str = "run") -> Config:
  """The config of the run in `directory`, without what belonged to the command that made it.

  Raises InputError, naming the setting `path`, if there is none or if it does not fit this version.
  """
  if problem := run_directory_problem(path, directory):
    raise InputError(problem)
  file = Path(directory) / FILE
  try:
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
  except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
    raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
  if not isinstance(values, dict):
    raise InputError(f"{file}: holds no settings")
  try:
    cfg = to_config(values)
  except InputError as error:
    raise InputError([f"{file}: {problem}" for problem in error.problems]) from error
  cfg.train.resume = cfg.train.stop_at = None
  return to_config({**asdict(cfg), **ONCE})


def job_config(composed: DictConfig, overrides: Sequence[Override]) -> Config:
  """The config of one job: as composed, or with `run=DIR` and `train.resume=DIR` as saved and typed on top."""
  cfg = to_config(composed)
  if cfg.train.resume is not None:
    return _resumed(load(cfg.train.resume, "train.resume"), composed, overrides, cfg.train.resume)
  of_sweep = cfg.task in ("report", "dashboard") or (cfg.task == "inspect" and is_sweep(str(cfg.run)))
  if cfg.run is not None and cfg.task != "train" and not of_sweep:  # a sweep has no config
    return _on_top(load(cfg.run), composed, overrides)
  return cfg


def check_same(jobs: Iterable[tuple[int, Config, Path]]) -> None:
  """Raises InputError where the directory of a job (number, config, directory) of a sweep holds a run of another
  config."""
  problems = []
  for number, cfg, directory in jobs:
    if (directory / FILE).is_file() and (differ := [path for path, _, _ in changed(load(str(directory)), cfg)]):
      problems.append(
        f"hydra.sweep.dir={directory.parent}: run {number} was begun with another {', '.join(differ)}; give the same "
        "command again, or another directory"
      )
  if problems:
    raise InputError(problems)


def _on_top(saved: Config, composed: DictConfig, overrides: Sequence[Override]) -> Config:
  """`saved` with the nodes of the typed groups, and the typed values, of `composed`.

  Interpolations of a typed node see the saved settings around it: its seq_len is the saved model's max_len.
  """
  values = OmegaConf.to_container(composed, resolve=False)
  assert isinstance(values, dict)
  merged = _literal(asdict(saved))
  problems = []
  for override in sorted(overrides, key=lambda override: "." in override.key_or_group):  # a group before its values
    if override.key_or_group in GLOBAL_GROUPS:
      problems.append(f"{override.input_line}: cannot be laid over a saved run; type the settings themselves")
    elif not override.is_hydra_override():
      _copy(override.package or override.key_or_group, values, merged)
  if problems:
    raise InputError(problems)
  return to_config(OmegaConf.create(merged))


def _literal(node: Any) -> Any:
  """`node` with every `${` escaped: text of a saved config is text."""
  if isinstance(node, dict):
    return {key: _literal(value) for key, value in node.items()}
  if isinstance(node, list):
    return [_literal(value) for value in node]
  return node.replace("${", "\\${") if isinstance(node, str) else node


def _copy(path: str, source: Any, target: dict[str, Any]) -> None:
  """Sets `path` in `target` to what it is in `source`, with the groups around it where `target` has none."""
  *parents, name = path.split(".")
  for parent in parents:
    source = source[parent]
    if not isinstance(target.get(parent), dict):
      target[parent] = copy.deepcopy(source)
    target = target[parent]
  target[name] = copy.deepcopy(source.get(name))


def _resumed(saved: Config, composed: DictConfig, overrides: Sequence[Override], directory: str) -> Config:
  cfg = _on_top(saved, composed, overrides)
  problems = []
  for path, old, new in changed(saved, cfg):
    if path != "train.steps":
      problems.append(f"{path}={shown(new)}: the run in {directory} has {shown(old)}, and a run goes on as it began; "
                      "leave it out, or start a new run")
    elif saved.optim.schedule != "constant":
      problems.append(f"train.steps={shown(new)}: the {saved.optim.schedule} schedule was planned for {shown(old)} "
                      "steps; only a run with optim.schedule=constant can be made longer")
    elif old is None or new is None or new < old:
      problems.append(f"train.steps={shown(new)}: must be at least the run's {shown(old)}")
  if problems:
    raise InputError(problems)
  return cfg


def changed(before: Config, after: Config) -> list[tuple[str, Any, Any]]:
  """(path, before, after) of every setting that differs, apart from the FREE ones."""
  old, new = _flat(asdict(before)), _flat(asdict(after))
  paths = [path for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]
  chosen = () if before.lora.parameters is None else ("lora.rank",)  # which then follows from the budget
  free = lambda path: any(f"{path}.".startswith(f"{name}.") for name in (*FREE, *chosen))
  return [(path, old.get(path), new.get(path)) for path in paths if not free(path)]


def _flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in node.items():
    if isinstance(value, dict) and value:
      flat |= _flat(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = value
  return flat

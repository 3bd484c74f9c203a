"""The typed config of one job: composed from `conf/` or, with `run=DIR` and `train.resume=DIR`, the saved config."""

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from lora_exp.cli.architecture import composed_values
from lora_exp.cli.override_names import GLOBAL_GROUPS
from lora_exp.cli.paths import with_absolute_paths
from lora_exp.config.conversion import shown, to_config
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config
from lora_exp.runtime.run_directory import is_sweep
from lora_exp.runtime.saved_config import MOVABLE, changed_settings, load_config, with_old_defaults

DIRECTORY_TASKS = ("report", "dashboard", "list", "clean")  # run= is a directory of runs, which has no config


def job_config(composed: DictConfig, overrides: Sequence[Override], sweep: Path | None = None) -> Config:
  """Returns the config of the job that was composed from `overrides`; `sweep` is the directory of its sweep, if any.

  Raises InputError with every unknown setting and every value of a wrong type.
  """
  cfg = _typed(composed)
  _choose_base(cfg, overrides)
  if cfg.train.resume is not None:
    return _resumed(load_config(cfg.train.resume, "train.resume"), composed, overrides, cfg.train.resume)
  reads_sweep = cfg.task in DIRECTORY_TASKS or (cfg.task == "inspect" and is_sweep(str(cfg.run)))
  if cfg.run is not None and cfg.task != "train" and not reads_sweep:  # a sweep has no config of its own
    return _typed_over_saved(load_config(cfg.run), composed, overrides)
  if sweep is not None:
    return with_old_defaults(cfg, sweep, [override.key_or_group for override in overrides])
  return cfg


def _choose_base(cfg: Config, overrides: Sequence[Override]) -> None:
  """Sets `model.base=weights` if `model.weights` was typed for a model whose base is random by default.

  Raises InputError if a random base was typed as well. Without typed weights, `model.base=random` makes random weights
  of a published model's shape.
  """
  typed = [override.key_or_group for override in overrides]
  if cfg.model.base != "random" or cfg.model.weights is None or "model.weights" not in typed:
    return
  if "model.base" in typed:
    raise InputError(f"model.base=random: model.weights={cfg.model.weights} would not be loaded; remove one of them")
  cfg.model.base = "weights"


def _typed(composed: DictConfig) -> Config:
  return with_absolute_paths(to_config(composed_values(composed)))


def _typed_over_saved(saved: Config, composed: DictConfig, overrides: Sequence[Override]) -> Config:
  """Returns `saved` with the groups and values of `overrides` taken from `composed`.

  Interpolations in an overridden group use the saved settings: its seq_len follows the saved model's max_len.
  """
  values = OmegaConf.to_container(composed, resolve=False)
  assert isinstance(values, dict)
  merged = _escape_interpolations(asdict(saved))
  problems = []
  for override in sorted(overrides, key=_is_single_value):  # a group before the values in it
    if override.key_or_group in GLOBAL_GROUPS:
      problems.append(f"{override.input_line}: cannot be applied to a saved run; give the settings themselves")
    elif not override.is_hydra_override():
      _copy_setting(override.package or override.key_or_group, values, merged)
  if problems:
    raise InputError(problems)
  return _typed(OmegaConf.create(merged))


def _is_single_value(override: Override) -> bool:
  return "." in override.key_or_group


def _escape_interpolations(node: Any) -> Any:
  """`node` with every `${` escaped, because a saved config has no interpolations."""
  if isinstance(node, dict):
    return {key: _escape_interpolations(value) for key, value in node.items()}
  if isinstance(node, list):
    return [_escape_interpolations(value) for value in node]
  return node.replace("${", "\\${") if isinstance(node, str) else node


def _copy_setting(path: str, source: Any, target: dict[str, Any]) -> None:
  """Copies the setting `path` from `source` to `target`, and creates missing groups."""
  *groups, name = path.split(".")
  for group in groups:
    source = source[group]
    if not isinstance(target.get(group), dict):
      target[group] = copy.deepcopy(source)
    target = target[group]
  target[name] = copy.deepcopy(source.get(name))


def _resumed(saved: Config, composed: DictConfig, overrides: Sequence[Override], directory: str) -> Config:
  """The config of a resumed run. Raises InputError with every override that a resumed run cannot change."""
  cfg = _typed_over_saved(saved, composed, overrides)
  problems = []
  for path, old, new in changed_settings(saved, cfg):
    if path in MOVABLE and None not in (old, new):
      continue  # files that moved: their content is compared when the checkpoint is restored
    if path != "train.steps":
      problems.append(f"{path}={shown(new)}: the run in {directory} has {shown(old)}, which a resumed run keeps; "
                      "remove it, or start a new run")
    elif saved.optim.schedule != "constant":
      problems.append(f"train.steps={shown(new)}: the {saved.optim.schedule} schedule was planned for {shown(old)} "
                      "steps; only a run with optim.schedule=constant can be made longer")
    elif old is None or new is None or new < old:
      problems.append(f"train.steps={shown(new)}: must be at least the run's {shown(old)}")
  if problems:
    raise InputError(problems)
  return cfg

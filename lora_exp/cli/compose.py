"""Composes a config for each job from overrides, without running anything."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.cli.hydra_environment import files_measured
from lora_exp.cli.hydra_errors import (
  hydra_errors,
  leaves,
  malformed_sweep_settings,
  secret_settings,
  unsafe_hydra_settings,
)
from lora_exp.cli.override_names import OverrideNames, several_values_problems
from lora_exp.config.errors import InputError
from lora_exp.config.override_grammar import parse
from lora_exp.config.schema import Config
from lora_exp.runtime.cache_directory import default_cache
from lora_exp.runtime.yaml_text import safe_load
from lora_exp.sweep.packs.grid_jobs import grid_jobs
from lora_exp.sweep.rounds.round_plan import RoundPlan
from lora_exp.sweep.rounds.round_settings import read_rounds, round_run_problems
from lora_exp.sweep.study.study_settings import read_study, study_run_problems
from lora_exp.sweep.study.study_space import Study

OmegaConf.register_new_resolver("default_cache", default_cache, replace=True)

def conf_directory() -> Path:
  """`conf/` of the checkout, or its copy in an installed package."""
  package = Path(__file__).resolve().parents[1]
  for conf in (package.parent / "conf", package / "conf"):
    if (conf / "config.yaml").is_file():
      return conf
  raise InputError(f"{package.parent / 'conf'}: contains no config.yaml; reinstall lora_exp, or give --config-path=DIR")


@contextmanager
def composer(conf: Path, config_name: str = "config", extra: Path | None = None) -> Iterator["Composer"]:
  """Context with a `Composer`. Restores Hydra's process-wide state afterwards."""
  with files_measured(), initialize_config_dir(str(conf), version_base="1.3", job_name="lora_exp"):
    if extra is not None:  # as `hydra.main` does, so that the primary config may be there too
      search_path = create_config_search_path(search_path_dir=str(conf))
      search_path.prepend("command-line", f"file://{extra}", anchor=SearchPathQuery(provider="schema"))
      GlobalHydra.instance().clear()
      Hydra.create_main_hydra2("lora_exp", search_path)
    yield Composer(conf, config_name, extra)


class Composer:
  """Composes `config_name` of the directory `conf`; files of the directory `extra` come first."""

  def __init__(self, conf: Path, config_name: str, extra: Path | None):
    self.directories = [directory for directory in (extra, conf) if directory is not None]
    self.loader = GlobalHydra.instance().config_loader()
    self.config_name = config_name
    self._composed: dict[tuple[str, ...], DictConfig] = {}  # by the overrides that choose files
    with hydra_errors():
      self.names = OverrideNames(self.loader)

  def parse(self, texts: Sequence[str], several: bool) -> list[Override]:
    """The overrides in `texts`.

    Raises InputError with each one that is malformed, names what does not exist, or, unless `several`, has more than
    one value.
    """
    overrides, problems = parse(texts, self.loader)
    for override in overrides:
      problems += self.names.problems(override)
    if not several:
      problems += several_values_problems(overrides)
    if problems:
      raise InputError(problems)
    return overrides

  def compose(self, texts: Sequence[str], multirun: bool = False) -> DictConfig:
    """Composes the config with the node `hydra`; with `multirun`, settings with lists of values keep their defaults."""
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    with hydra_errors():
      cfg = self.loader.load_configuration(
        self.config_name, list(texts), run_mode=mode, from_shell=False,
        validate_sweep_overrides=not multirun,
      )  # fmt: skip
      malformed = malformed_sweep_settings(cfg.hydra)
    if problems := [*malformed, *unsafe_hydra_settings(cfg.hydra), *secret_settings(cfg)]:
      raise InputError(problems)
    return cfg

  def compose_job(self, hydra: Sequence[str], overrides: Sequence[Override]) -> DictConfig:
    """Composes one of several jobs, with the same result as `compose`. Does not read files of earlier jobs again."""
    single_values = [override for override in overrides if _sets_one_value(override)]
    choices = (*hydra, *(str(o.input_line) for o in overrides if o not in single_values))
    if choices not in self._composed:
      self._composed[choices] = self.compose(choices)
    cfg = copy.deepcopy(self._composed[choices])
    try:
      for override in single_values:
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=override.is_force_add())
    except OmegaConfBaseException:
      return self.compose([*hydra, *(str(o.input_line) for o in overrides)])  # raises, and says what is wrong
    return cfg

  def with_file_names(self, problems: Sequence[str], cfg: DictConfig) -> list[str]:
    """Puts the name of the config file in front of each of `problems` that is about an unknown setting in it."""
    if not any(": no such setting" in problem for problem in problems):
      return list(problems)
    files = {key: file for file, package in self._chosen_files(cfg) for key in _settings_of(file, package)}
    return [f"{files[key]}: {problem}" if (key := problem.split(":")[0]) in files else problem for problem in problems]

  def _chosen_files(self, cfg: DictConfig) -> Iterator[tuple[Path, str]]:
    """The config files that `cfg` is composed of, and the package of each."""
    chosen = [(self.config_name, "")]
    for key, choice in cfg.hydra.runtime.choices.items():
      group, _, package = key.partition("@")
      if isinstance(choice, str) and not key.startswith("hydra/"):
        chosen.append((f"{group}/{choice}", package or group))
    for name, package in chosen:
      yield from ((d / f"{name}.yaml", package) for d in self.directories if (d / f"{name}.yaml").is_file())

  def job_overrides(self, master: DictConfig, overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each job in the order that the sweeper uses: those of the sweep file, then the typed ones."""
    sweeper = master.hydra.runtime.choices["hydra/sweeper"]
    if sweeper == "study":
      return self._study(master, overrides).examples()
    if sweeper == "rounds":
      return self._rounds(master, overrides).grid
    if sweeper not in ("grid", "basic"):  # the overrides are not known before the sweep runs
      return [[str(o.input_line) for o in overrides if not o.is_sweep_override()]]
    return grid_jobs(master.hydra.sweeper, overrides, self._parse_several)

  def sweep_problems(self, master: DictConfig, overrides: Sequence[Override], cfgs: Sequence[Config]) -> list[str]:
    """Problems of the sweeper with the runs `cfgs`."""
    sweeper = master.hydra.runtime.choices["hydra/sweeper"]
    if sweeper == "study":
      study = self._study(master, overrides)
      return [problem for cfg in cfgs for problem in study_run_problems(study, cfg)]
    if sweeper == "rounds":
      plan = self._rounds(master, overrides)
      return [problem for cfg in cfgs for problem in round_run_problems(plan, cfg)]
    return []

  def _study(self, master: DictConfig, overrides: Sequence[Override]) -> Study:
    return read_study(master.hydra.sweeper, overrides, self._parse_several)

  def _rounds(self, master: DictConfig, overrides: Sequence[Override]) -> RoundPlan:
    return read_rounds(master.hydra.sweeper, overrides, self._parse_several)

  def _parse_several(self, texts: list[str]) -> list[Override]:
    return self.parse(texts, several=True)


def _sets_one_value(override: Override) -> bool:
  """Whether an override changes a single setting instead of choosing a file."""
  is_setting = "." in override.key_or_group and not override.package and not override.is_hydra_override()
  return is_setting and override.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD)


def _settings_of(file: Path, package: str) -> list[str]:
  """The dotted settings of a config file in `package`, or in the package that its first line names."""
  text = file.read_text(encoding="utf-8")
  if header := re.match(r"# @package (\S+)", text):
    package = "" if header[1] == "_global_" else header[1]
  node = safe_load(text)
  return [path for path, _ in leaves(node, package)] if isinstance(node, dict) else []

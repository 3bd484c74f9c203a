"""From overrides to composed configs, one for each job, without starting anything."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.cli import grid, study_space
from lora_exp.cli.overrides import Names, not_one_value, parse, quoted
from lora_exp.config.credentials import credential_problem
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config

PLUGINS = ("hydra._internal.core_plugins.", "hydra_plugins.")
LOG_HANDLERS = ("logging.FileHandler", "logging.StreamHandler", "logging.NullHandler")
MOST_CHECKED = 256  # jobs of a multirun that are composed before the first starts, about 0.05 s each


def conf_directory() -> Path:
  """`conf/` of the checkout, or the copy inside an installed package."""
  package = Path(__file__).resolve().parents[1]
  for conf in (package.parent / "conf", package / "conf"):
    if (conf / "config.yaml").is_file():
      return conf
  raise InputError(f"{package.parent / 'conf'}: no config.yaml there; reinstall lora_exp, or give --config-path=DIR")


class Composer:
  """Composes `config_name` of one `conf` directory, with the files of `extra` beside its own."""

  def __init__(self, conf: Path, config_name: str, extra: Path | None):
    self.directories = [directory for directory in (extra, conf) if directory is not None]
    self.loader = GlobalHydra.instance().config_loader()
    self.config_name = config_name
    self.chosen: dict[tuple[str, ...], DictConfig] = {}  # by the overrides that choose files
    self.searchpath = [] if extra is None else [f"hydra.searchpath=[{quoted(f'file://{extra}')}]"]
    with hydra_errors():
      self.names = Names(self.loader, self.searchpath)

  def parse(self, texts: Sequence[str], several: bool) -> list[Override]:
    """The overrides; raises InputError with each that is malformed, names what does not exist, or holds more than
    one value without `several`."""
    overrides, problems = parse(texts, self.loader)
    for override in overrides:
      problems += self.names.problems(override)
    if not several:
      problems += not_one_value(overrides)
    if problems:
      raise InputError(problems)
    return overrides

  def compose(self, texts: Sequence[str], multirun: bool = False) -> DictConfig:
    """The config with Hydra's own node; with `multirun`, lists of values are left at their defaults."""
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    with hydra_errors():
      cfg = self.loader.load_configuration(self.config_name, [*self.searchpath, *texts], run_mode=mode,
                                           from_shell=False, validate_sweep_overrides=not multirun)
    if problems := hydra_problems(cfg.hydra):
      raise InputError(problems)
    return cfg

  def compose_job(self, hydra: Sequence[str], overrides: Sequence[Override]) -> DictConfig:
    """The config of one job of several, as `compose` makes it; files that an earlier job chose are not read again."""
    values = [o for o in overrides if o.type == OverrideType.CHANGE and "." in o.key_or_group and not o.package
              and not o.is_hydra_override()]  # fmt: skip
    choices = (*hydra, *(str(o.input_line) for o in overrides if o not in values))
    if choices not in self.chosen:
      self.chosen[choices] = self.compose(choices)
    cfg = copy.deepcopy(self.chosen[choices])
    try:
      for override in values:
        OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    except OmegaConfBaseException:
      return self.compose([*hydra, *(str(o.input_line) for o in overrides)])  # which says what is wrong
    return cfg

  def located(self, problems: Sequence[str], cfg: DictConfig) -> list[str]:
    """`problems`, those about unknown settings after the name of the config file that has them."""
    if not any(": no such setting" in problem for problem in problems):
      return list(problems)
    files = {key: file for file, package in self._files(cfg) for key in _keys(file, package)}
    return [f"{files[key]}: {problem}" if (key := problem.split(":")[0]) in files else problem for problem in problems]

  def _files(self, cfg: DictConfig) -> Iterator[tuple[Path, str]]:
    chosen = [(self.config_name, "")]
    for place, choice in cfg.hydra.runtime.choices.items():
      group, _, package = place.partition("@")
      if isinstance(choice, str) and not place.startswith("hydra/"):
        chosen.append((f"{group}/{choice}", package or group))
    for name, package in chosen:
      yield from ((d / f"{name}.yaml", package) for d in self.directories if (d / f"{name}.yaml").is_file())

  def jobs(self, master: DictConfig, overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each job, as the sweeper will make them: those of the sweep's file, then what was typed."""
    chosen = master.hydra.runtime.choices["hydra/sweeper"]
    if chosen == "study":
      return self._study(master, overrides).examples()
    if chosen not in ("grid", "basic"):  # another makes them as it goes
      return [[str(o.input_line) for o in overrides if not o.is_sweep_override()]]
    return grid.jobs(master.hydra.sweeper, overrides, lambda texts: self.parse(texts, several=True))

  def sweep_problems(self, master: DictConfig, overrides: Sequence[Override], cfgs: Sequence[Config]) -> list[str]:
    """What the sweeper cannot do with the runs `cfgs`."""
    if master.hydra.runtime.choices["hydra/sweeper"] != "study":
      return []
    found = self._study(master, overrides)
    return [problem for cfg in cfgs for problem in study_space.run_problems(found, cfg)]

  def _study(self, master: DictConfig, overrides: Sequence[Override]) -> study_space.Study:
    return study_space.read(master.hydra.sweeper, overrides, lambda texts: self.parse(texts, several=True))


@contextmanager
def composer(conf: Path, config_name: str = "config", extra: Path | None = None) -> Iterator[Composer]:
  """A `Composer`; Hydra's process-wide state is put back afterwards."""
  with initialize_config_dir(str(conf), version_base="1.3", job_name="lora_exp"):
    yield Composer(conf, config_name, extra)


@contextmanager
def hydra_errors() -> Iterator[None]:
  """What Hydra refuses while composing becomes an InputError of one sentence."""
  try:
    yield
  except yaml.YAMLError as error:
    raise InputError(f"not a YAML file: {' '.join(str(error).split())}") from error
  except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
    cause = f" {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    lines = [line.strip() for line in f"{error}{cause}".splitlines()]
    noise = ("full_key:", "object_type", "reference_type", "See ", "To append")
    said = " ".join([line for line in lines if line and not line.startswith(noise)][:12])
    raise InputError(re.sub(r"^(Could not override '.*')\.$", r"\1: no such setting", said)) from error


def hydra_problems(hydra: DictConfig) -> list[str]:
  """What config files must not do to Hydra: run callbacks, load classes, change the directory, hold keys."""
  node: dict[str, Any] = OmegaConf.to_container(hydra, resolve=False)  # type: ignore[assignment]
  problems = []
  if node.get("callbacks"):
    problems.append("hydra.callbacks: a config file sets callbacks, which can run any code; remove them")
  if node["job"].get("chdir"):
    problems.append("hydra.job.chdir=true: paths are relative to where the command is typed; remove it")
  for path, value in _walk(node, "hydra"):
    word = path.rsplit(".", 1)[-1]
    logs = path.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
    foreign = word == "_target_" and not str(value).startswith(PLUGINS)
    if foreign or (logs and (word == "()" or (word == "class" and value not in LOG_HANDLERS))):
      problems.append(f"{path}={value}: a config file names a class to load; remove it")
    if path.startswith("hydra.job.env_set."):
      problems += credential_problem(path, str(value))
  return problems


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
  if isinstance(node, dict):
    for key, value in node.items():
      yield from _walk(value, f"{path}.{key}" if path else str(key))
  elif isinstance(node, list):
    for value in node:
      yield from _walk(value, path)
  else:
    yield path, node


def _keys(file: Path, package: str) -> list[str]:
  """The settings of a config file whose keys belong into `package`."""
  text = file.read_text(encoding="utf-8")
  if found := re.match(r"# @package (\S+)", text):
    package = "" if found[1] == "_global_" else found[1]
  node = yaml.safe_load(text)
  return [path for path, _ in _walk(node, package)] if isinstance(node, dict) else []

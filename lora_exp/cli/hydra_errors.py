"""Hydra's errors as one sentence, and checks of untrusted config files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp.config.credentials import credential_problem, environment_problem
from lora_exp.config.errors import InputError

PLUGIN_PACKAGES = ("hydra._internal.core_plugins.", "hydra_plugins.")
LOG_HANDLERS = ("logging.FileHandler", "logging.StreamHandler", "logging.NullHandler")
NOISE = ("full_key:", "object_type", "reference_type", "See ", "To append")  # lines of Hydra's errors without use
MOST_LINES = 12
NOT_A_MAPPING = "is not a mapping; choose a file with hydra/{name}=NAME"
SWEEPER_MAPPINGS = {"params": "{lora.rank: '1,2'}", "tune": "{setting: optim.lr}", "decide": "{looks: [3, 5]}",
                    "budget": "{steps: 20000}"}  # setting of hydra.sweeper -> an example
SWEEPER_LISTS = {"zip": "[{lora.rank: '1,2', lora.alpha: '2,4'}]", "extra": "[{lora: frozen}]"}


@contextmanager
def hydra_errors() -> Iterator[None]:
  """Context that converts composition errors of Hydra to an InputError with one sentence."""
  try:
    yield
  except yaml.YAMLError as error:
    raise InputError(f"not a YAML file: {' '.join(str(error).split())}") from error
  except (HydraException, OmegaConfBaseException, ValueError, OSError) as error:
    cause = f" {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    lines = [line.strip() for line in f"{error}{cause}".splitlines()]
    message = " ".join([line for line in lines if line and not line.startswith(NOISE)][:MOST_LINES])
    for name in ("launcher", "sweeper"):  # where a plugin declares the type of the node
      wrong_type = rf"Merge error: \w+ is not a subclass of \w*{name.title()}Conf\. value: (\S+)"
      message = re.sub(wrong_type, rf"hydra.{name}=\1: {NOT_A_MAPPING.format(name=name)}", message)
    raise InputError(re.sub(r"^(Could not override '.*')\.$", r"\1: no such setting", message)) from error


def unsafe_hydra_settings(hydra: DictConfig) -> list[str]:
  """Problems with the node `hydra`: callbacks, classes to load, another working directory, credentials."""
  node: dict[str, Any] = OmegaConf.to_container(hydra, resolve=False)  # type: ignore[assignment]
  problems = []
  if node.get("callbacks"):
    problems.append("hydra.callbacks: a config file sets callbacks, which can run any code; remove them")
  if node["job"].get("chdir"):
    problems.append("hydra.job.chdir=true: paths are relative to the directory that the command is run in; remove it")
  for path, value in leaves(node, "hydra"):
    if _loads_foreign_class(path, value):
      problems.append(f"{path}={value}: a config file names a class to load; remove it")
    if path.startswith("hydra.sweeper.") and re.search("metric_file|harness_tasks", f"{path}={value}"):
      problems.append(f"{path}: names files that are executed, so only the command line can set it; remove it")
    problems += credential_problem(path, str(value)) or environment_problem(path, str(value))
  return problems


def malformed_sweep_settings(hydra: DictConfig) -> list[str]:
  """Problems with the type of hydra.launcher, of hydra.sweeper, and of the jobs that it describes."""
  problems = [f"hydra.{name}={hydra.get(name)}: {NOT_A_MAPPING.format(name=name)}"
              for name in ("launcher", "sweeper") if not isinstance(hydra.get(name), Mapping)]
  sweeper = hydra.get("sweeper") if not problems else {}
  for key, example in SWEEPER_MAPPINGS.items():
    value = sweeper.get(key)
    if not (value is None or isinstance(value, Mapping)):
      problems.append(f"hydra.sweeper.{key}={value}: give a mapping such as {example}, or null")
  for key, example in SWEEPER_LISTS.items():
    value = sweeper.get(key)
    if not (value is None or _is_list_of_mappings(value)):
      problems.append(f"hydra.sweeper.{key}={value}: give a list of mappings such as {example}, or null")
  return problems


def _is_list_of_mappings(value: object) -> bool:
  return isinstance(value, Sequence) and all(isinstance(point, Mapping) for point in value)


def secret_settings(cfg: DictConfig) -> list[str]:
  """Problems with credentials in the settings of a composed config, whose interpolations are not resolved."""
  node: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
  problems = []
  for path, value in leaves({key: part for key, part in node.items() if key != "hydra"}, ""):
    if isinstance(value, str):
      problems += credential_problem(path, value) or environment_problem(path, value)
  return problems


def _loads_foreign_class(path: str, value: Any) -> bool:
  key = path.rsplit(".", 1)[-1]
  if key == "_target_" and not str(value).startswith(PLUGIN_PACKAGES):
    return True
  is_logging = path.startswith(("hydra.job_logging.", "hydra.hydra_logging."))
  return is_logging and (key == "()" or (key == "class" and value not in LOG_HANDLERS))


def leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
  """(dotted path, value) of every value in nested mappings; the elements of a list have the path of the list."""
  if isinstance(node, dict):
    for key, value in node.items():
      yield from leaves(value, f"{path}.{key}" if path else str(key))
  elif isinstance(node, list):
    for value in node:
      yield from leaves(value, path)
  else:
    yield path, node

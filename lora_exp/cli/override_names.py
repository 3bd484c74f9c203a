"""Checks that the settings, groups and choices in overrides exist, and suggests the nearest spelling otherwise."""

from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override

from lora_exp.config.credentials import credential_problem, environment_problem
from lora_exp.config.errors import did_you_mean
from lora_exp.config.override_grammar import quoting_advice
from lora_exp.config.schema import Config
from lora_exp.config.setting_names import all_settings, group_class, is_setting, suggestion

CODE_LOADING = ("hydra.callbacks", "hydra.job_logging", "hydra.hydra_logging", "hydra.searchpath")
GLOBAL_GROUPS = ("experiment", "sweep")  # their files set keys of other groups


def credential_problems(texts: Sequence[str]) -> list[str]:
  """A problem for each override whose value looks like a credential; the value is not repeated."""
  problems = []
  for text in texts:
    key, _, value = text.partition("=")
    problems += credential_problem(key, value) or environment_problem(key, value)
  return problems


def several_values_problems(overrides: Sequence[Override]) -> list[str]:
  """A problem for each list of values outside of a multirun; it is usually text that contains a comma."""
  problems = []
  known = dict(all_settings())
  for override in overrides:
    if override.is_sweep_override():
      text, hint = str(override.input_line), known.get(override.key_or_group)
      may_be_text = {hint, *get_args(hint)} & {str, Any, list[str]}  # only text has commas
      advice = quoting_advice(text).replace("its value needs quotes", "one value with a comma needs quotes")
      problems.append(f"{text}: several values need -m, which runs one job for each{advice if may_be_text else ''}")
  return problems


class OverrideNames:
  """The groups and choices of Hydra's `loader`."""

  def __init__(self, loader: ConfigLoader):
    self.loader = loader
    hydra_groups = [f"hydra/{name}" for name in self._options("hydra", ObjectType.GROUP)]
    self.groups = [name for name in self._options("", ObjectType.GROUP) if name != "hydra"] + hydra_groups

  def problems(self, override: Override) -> list[str]:
    """Problems with the names in `override`."""
    key = override.key_or_group
    dotted = f"{key.replace('/', '.')}."
    for name in CODE_LOADING:
      if dotted.startswith(f"{name}."):
        return [f"{key}: {name} can load code and cannot be set; hydra.verbose=true shows more of the log"]
    if "_target_" in str(override.input_line).partition("=")[0] or _has_target(override.value()):
      return [f"{key}: _target_ cannot be set; choose a config by name, such as optim=adamw"]
    if key.replace(".", "/", 1) in self.groups and key.startswith("hydra.") and not isinstance(override.value(), dict):
      return [_dotted_group_problem(override)]
    if key in self.groups and not isinstance(override.value(), dict):
      return list(self._group_problems(override))
    if override.package is not None or "/" in key:
      return [f"{override.input_line}: no such group {key}{did_you_mean(key, self.groups)}"]
    return [] if key.startswith("hydra.") else list(_setting_problems(override))

  def _options(self, group: str, kind: ObjectType) -> list[str]:
    """The subgroups or files of `group`, without base files, whose names begin with _."""
    options = self.loader.get_group_options(group, kind, config_name="config", overrides=[])
    return [name for name in options if not name.startswith("_")]

  def _choices(self, group: str) -> list[str]:
    """The files of a group, without base files."""
    return self._options(group, ObjectType.CONFIG)

  def _group_problems(self, override: Override) -> Iterator[str]:
    group, text = override.key_or_group, override.input_line
    hints = get_type_hints(Config)
    cls = group_class(hints.get(group))
    packages = [name for name, hint in hints.items() if cls is not None and group_class(hint) is cls]
    if override.package is not None and override.package not in packages:
      names = [f"{group}@{name}" for name in packages if name != group]
      yield f"{text}: no such package @{override.package}" + (f": choose {', '.join(names)}" if names else "")
    elif override.is_delete():
      if type(None) not in get_args(hints.get(str(override.package))):
        yield f"{text}: {group} cannot be removed; choose another, such as {group}={self._choices(group)[0]}"
    elif (override.is_add() or override.is_force_add()) and not group.startswith("hydra/"):
      yield f"{text}: {group} is a default already; write it without +:  {str(text).lstrip('+')}"
    else:
      yield from self._choice_problems(override)

  def _choice_problems(self, override: Override) -> Iterator[str]:
    group, key = override.key_or_group, override.get_key_element()
    choices = self._choices(group)
    values = _chosen(override)
    if override.is_discrete_sweep() and not values:
      yield f"{override.input_line}: matches no choice: {', '.join(choices)}"
    for value in values:
      if value in choices:
        continue
      word = "null" if value is None else str(value)
      if word.startswith("wandb/") and key == "sweep":
        yield f"sweep={word}: is for wandb's agents: run wandb sweep sweeps/{word.removesuffix('.yaml')}.yaml"
      else:
        near = did_you_mean(word, choices)
        yield f"{key}={word}: choose {', '.join(choices)}{near}{_off_advice(key, value, choices)}"


def _dotted_group_problem(override: Override) -> str:
  """The problem of an override such as hydra.launcher=packed, which names a file with a dot instead of a slash."""
  group, value = override.key_or_group.replace(".", "/", 1), override.get_value_element_as_str()
  return f"{override.input_line}: a file is chosen with a slash; write {group}={'NAME' if value == 'null' else value}"


def _chosen(override: Override) -> list[Any]:
  """The choices named in an override of a group."""
  if override.is_discrete_sweep():
    return [text.strip("'\"") for text in override.sweep_string_iterator()]
  if override.is_sweep_override():
    return [None]
  value = override.value()
  return value if isinstance(value, list) and override.key_or_group in GLOBAL_GROUPS else [value]


def _off_advice(key: str, value: Any, choices: Sequence[str]) -> str:
  """Advice on switching a group off, if the value is null."""
  if value is None and key in GLOBAL_GROUPS:
    return f"; to switch it off, remove {key}"
  return "; did you mean none?" if value is None and "none" in choices else ""


def _setting_problems(override: Override) -> Iterator[str]:
  key, text = override.key_or_group, str(override.input_line)
  unknown = [name for name in _names_set(key, override.value()) if not is_setting(name)]
  for name in unknown:
    near = did_you_mean(name, GLOBAL_GROUPS) if "." not in name else ""
    yield f"{name}: no such setting{near or suggestion(name)}"
  if unknown:
    return
  if override.is_delete():
    yield f"{text}: a setting cannot be removed; give it a value, such as {key}=null if it can be off"
  elif override.is_add():
    yield f"{text}: {key} already has a value; write it without +: {text[1:]}"


def _names_set(key: str, value: Any) -> list[str]:
  """The settings that `key=value` sets: several if the value is a mapping."""
  if not isinstance(value, dict) or not is_setting(key):
    return [key]
  names = []
  for name, inner in value.items():
    names += _names_set(f"{key}.{name}", inner)
  return names or [key]


def _has_target(value: Any) -> bool:
  """Whether a mapping anywhere in `value` has the key `_target_`."""
  if isinstance(value, dict):
    return "_target_" in map(str, value) or any(map(_has_target, value.values()))
  return isinstance(value, list) and any(map(_has_target, value))

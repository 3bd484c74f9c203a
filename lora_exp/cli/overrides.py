"""What was typed: Hydra's override grammar, and whether the names and choices in it exist.

An override is `key=value`, `+key=value`, `~key` or `group=choice`. Hydra stops at the first that it cannot read; here
each is looked at, and a problem is one line that says what to type instead.
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_type_hints

from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from lora_exp.config.conversion import group_class, is_setting, settings, suggestion
from lora_exp.config.credentials import credential_problem
from lora_exp.config.errors import did_you_mean
from lora_exp.config.schema import Config

CODE = ("hydra.callbacks", "hydra.job_logging", "hydra.hydra_logging", "hydra.searchpath")  # each can load foreign code
GLOBAL_GROUPS = ("experiment", "sweep")  # their files set keys of other groups


def parse(texts: Sequence[str], loader: ConfigLoader | None) -> tuple[list[Override], list[str]]:
  """The overrides that can be read, and a problem for each that cannot."""
  parser = OverridesParser.create(config_loader=loader)
  overrides, problems = [], []
  value = ""  # of the setting before it, typed without '='
  for text, after in itertools.zip_longest(texts, texts[1:], fillvalue=""):
    if "=" not in text and not text.startswith("~"):
      if text != value:
        value = "" if "=" in after else after
        problems.append(_no_equals(text, value))
      continue
    try:
      overrides += parser.parse_overrides([text])
    except HydraException:
      problems.append(f"{text}: not understood{quoting_advice(text)}")
  return overrides, problems


def _no_equals(text: str, after: str) -> str:
  if re.fullmatch(r"[\w.@/]+", text) and not re.fullmatch(r"[\d.]+", text):
    return f"{text}: a setting takes '=': {text}={after or 'VALUE'}"
  return f"{text}: not a setting; write key=value, with quotes around a value with spaces"


def quoting_advice(text: str) -> str:
  """'; its value needs quotes: …', the override `text` as a shell needs it, or ''.

  >>> print(quoting_advice("lora.targets=re:(q|v)_proj"))
  ; its value needs quotes: 'lora.targets="re:(q|v)_proj"'
  """
  key, equals, value = text.partition("=")
  if value.startswith("[") and "]" not in value:
    return "; a list ends with ]"
  candidates = [f"{key}={quoted(value)}"]
  if re.fullmatch(r"\[.*\]", value, re.DOTALL):
    items = [item.strip() for item in value[1:-1].split(",")]
    words = [item if re.fullmatch(r"[\w.*]+", item) else quoted(item.strip("'\"")) for item in items]
    candidates.insert(0, f"{key}=[{','.join(words)}]")
  if pair := re.fullmatch(r"\{(.*):\s*([\w.]+)\}", value, re.DOTALL):
    candidates = [f"{key}={{{escaped(pair[1])}: {pair[2]}}}"]
  for candidate in candidates if equals else []:
    try:
      OverridesParser.create().parse_override(candidate)
    except HydraException:
      continue
    return f"; its value needs quotes: {shlex.quote(candidate)}"
  return ""


def escaped(key: str) -> str:
  r"""`key` as the key of a mapping, which Hydra's grammar does not let be quoted: re\:\(q|v\)."""
  return re.sub(r"([][(){}:=, ])", r"\\\1", key)


def quoted(value: str) -> str:
  """`value` between double quotes, as Hydra's grammar reads it back unchanged."""
  value = re.sub(r'(\\*)"', r'\1\1\\"', value)
  return '"' + re.sub(r"(\\+)$", r"\1\1", value) + '"'


def credentials(texts: Sequence[str]) -> list[str]:
  """A problem for each override that holds something like a password; the value is not repeated."""
  return [line for text in texts for line in credential_problem(text.partition("=")[0], text.partition("=")[2])]


def not_one_value(overrides: Sequence[Override]) -> list[str]:
  """A problem for each list of values outside of a multirun: most often text with a comma."""
  problems = []
  known = dict(settings())
  for override in overrides:
    if override.is_sweep_override():
      text, hint = str(override.input_line), known.get(override.key_or_group)
      words = {hint, *get_args(hint)} & {str, Any, list[str]}  # only text has commas
      advice = quoting_advice(text).replace("its value needs quotes", "one value with a comma needs quotes")
      problems.append(f"{text}: several values need -m, and make a run each{advice if words else ''}")
  return problems


class Names:
  """The groups and choices that exist, asked of Hydra's `loader` (`searchpath`: overrides that add directories)."""

  def __init__(self, loader: ConfigLoader, searchpath: list[str]):
    self.loader, self.searchpath = loader, searchpath
    hydra = [f"hydra/{name}" for name in self._options("hydra", ObjectType.GROUP)]
    self.groups = [name for name in self._options("", ObjectType.GROUP) if name != "hydra"] + hydra

  def _options(self, group: str, kind: ObjectType) -> list[str]:
    return self.loader.get_group_options(group, kind, config_name="config", overrides=self.searchpath)

  def problems(self, override: Override) -> list[str]:
    """What is wrong with the names in `override`."""
    key = override.key_or_group
    if (code := next((c for c in CODE if f"{key.replace('/', '.')}.".startswith(f"{c}.")), None)):
      return [f"{key}: {code} can load code and cannot be set; hydra.verbose=true shows more of the log"]
    if "_target_" in str(override.input_line).partition("=")[0] or has_target(override.value()):
      return [f"{key}: _target_ cannot be set; parts are chosen by name, as optim=adamw"]
    if key in self.groups and not isinstance(override.value(), dict):
      return list(self._group(override))
    if override.package is not None or "/" in key:
      return [f"{override.input_line}: no such group {key}{did_you_mean(key, self.groups)}"]
    return [] if key.startswith("hydra.") else list(self._setting(override))

  def _group(self, override: Override) -> Iterator[str]:
    group, text = override.key_or_group, override.input_line
    hints = get_type_hints(Config)
    kind = group_class(hints.get(group))
    packages = [name for name, hint in hints.items() if kind is not None and group_class(hint) is kind]
    if override.package is not None and override.package not in packages:
      names = [f"{group}@{name}" for name in packages if name != group]
      yield f"{text}: no such place @{override.package}" + (f": choose {', '.join(names)}" if names else "")
    elif override.is_delete():
      if type(None) not in get_args(hints.get(str(override.package))):
        yield f"{text}: {group} cannot be removed; choose another, as {group}={self._choices(group)[0]}"
    elif (override.is_add() or override.is_force_add()) and not group.startswith("hydra/"):
      yield f"{text}: {group} is a default; write it without +: {str(text).lstrip('+')}"
    else:
      yield from self._values(override)

  def _choices(self, group: str) -> list[str]:
    return self._options(group, ObjectType.CONFIG)

  def _values(self, override: Override) -> Iterator[str]:
    choices = self._choices(override.key_or_group)
    if not override.is_sweep_override():
      value = override.value()
      values = value if isinstance(value, list) and override.key_or_group in GLOBAL_GROUPS else [value]
    elif override.is_discrete_sweep():
      values = [text.strip("'\"") for text in override.sweep_string_iterator()]
      if not values:
        yield f"{override.input_line}: matches no choice: {', '.join(choices)}"
    else:
      values = [None]
    for value in values:
      if value not in choices:
        key, word = override.get_key_element(), "null" if value is None else str(value)
        if word.startswith("wandb/") and key == "sweep":
          yield f"sweep={word}: is for wandb's own agents: wandb sweep sweeps/{word.removesuffix('.yaml')}.yaml"
          continue
        off = f"; to switch it off, leave {key} out" if value is None and key in GLOBAL_GROUPS else \
          "; did you mean none?" if value is None and "none" in choices else ""
        yield f"{key}={word}: choose {', '.join(choices)}{did_you_mean(word, choices)}{off}"

  def _setting(self, override: Override) -> Iterator[str]:
    key, text = override.key_or_group, str(override.input_line)
    unknown = [name for name in _keys(key, override.value()) if not is_setting(name)]
    for name in unknown:
      near = did_you_mean(name, GLOBAL_GROUPS) if "." not in name else ""
      yield f"{name}: no such setting{near or suggestion(name)}"
    if unknown:
      return
    if override.is_delete():
      yield f"{text}: a setting cannot be removed; give it a value, as {key}=null where it can be off"
    elif override.is_add() and not _in_table(key):
      yield f"{text}: {key} has a value already; write it without +: {text[1:]}"


def _keys(key: str, value: Any) -> list[str]:
  """The settings that `key=value` sets: more than one where the value is a mapping."""
  if not isinstance(value, dict) or not is_setting(key):
    return [key]
  return [name for k, v in value.items() for name in _keys(f"{key}.{k}", v)] or [key]


def _in_table(key: str) -> bool:
  return key.count(".") >= 2 and key.split(".")[1].endswith("_pattern")


def has_target(value: Any) -> bool:
  """Whether a mapping anywhere in `value` has the key `_target_`."""
  if isinstance(value, dict):
    return "_target_" in map(str, value) or any(map(has_target, value.values()))
  return isinstance(value, list) and any(map(has_target, value))

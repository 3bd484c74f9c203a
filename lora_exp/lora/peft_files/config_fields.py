"""Typed look-ups in adapter_config.json, which collect a problem for each invalid value."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_exp.lora.peft_files.patterns import LONGEST, Pattern, compiled

HIGHEST_RANK = 10**6
ALL_LINEAR = "all-linear"  # as target_modules: every linear module except the head
Targets = set[str] | Pattern | str | None  # module names, a pattern, ALL_LINEAR, or no value


@dataclass
class ConfigFields:
  """The fields of an adapter_config.json. `where` is the path of the file, for messages."""

  values: Mapping[str, Any]
  where: str
  problems: list[str] = field(default_factory=list)
  patterns: list[tuple[str, Pattern]] = field(default_factory=list)  # every pattern, with the name of its field

  def problem(self, text: str) -> None:
    """Adds a problem."""
    self.problems.append(f"{self.where}: {text}")

  def _typed(self, name: str, kind: type, default: Any) -> Any:
    """The field `name`, of type `kind`."""
    value = self.values.get(name, default)
    if not isinstance(value, kind):
      self.problem(f"{name}={shortened(value)}: must be {'true or false' if kind is bool else 'a mapping'}")
      return default
    return value

  def _flag(self, values: Mapping[str, Any], name: str, prefix: str = "") -> bool:
    """The boolean `name` of `values`; false if it is missing. `prefix` is for the message."""
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
      self.problem(f"{prefix}{name}={shortened(value)}: must be true or false")
    return value is True

  def _rank(self, name: str, value: Any) -> int:
    """A valid rank."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= HIGHEST_RANK:
      self.problem(f"{name}={shortened(value)}: must be an integer from 1 to {HIGHEST_RANK:,}")
      return 1
    return value

  def _masked_rank(self, name: str, mask: Any) -> int:
    """The number of ranks that remain of a mask; 0 if the module was pruned."""
    if not isinstance(mask, list) or not all(isinstance(x, bool) for x in mask):
      self.problem(f"{name}={shortened(mask)}: must be a list of true and false")
      return 1
    return sum(mask)

  def _alpha(self, name: str, value: Any) -> float:
    """A valid alpha."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e30:
      self.problem(f"{name}={shortened(value)}: must be a number above 0")
      return 1.0
    return float(value)

  def _patterns(self, name: str, read: Callable[[str, Any], Any], suffix: str = "") -> list[tuple[Pattern, Any]]:
    """The compiled patterns of `rank_pattern` or `alpha_pattern` and their values, checked by `read`.

    `suffix` is a segment at the end of each key that is not part of the module's name.
    """
    value_by_key = self.values.get(name)
    value_by_key = {} if value_by_key is None else value_by_key
    if not isinstance(value_by_key, dict):
      self.problem(f"{name}={shortened(value_by_key)}: must be a mapping from module names")
      return []
    patterns = []
    for key, value in value_by_key.items():
      module = re.sub(rf"\.{suffix}(\.\w+)?$", "", key) if suffix else key
      pattern = self._compiled(name, rf"(.*\.)?({module})", key)
      if pattern is not None:
        patterns.append((pattern, read(f"{name}.{shortened(key)}", value)))
    return patterns

  def _names(self, name: str) -> list[str]:
    """The list of module names in the field `name`."""
    names = self.values.get(name)
    names = [] if names is None else names
    if not isinstance(names, list) or not all(isinstance(x, str) and x for x in names):
      self.problem(f"{name}={shortened(names)}: must be a list of module names")
      return []
    return names

  def _targets(self, name: str) -> Targets:
    """The names or the pattern in the field `name`; None if it is missing."""
    targets = self.values.get(name)
    if targets is None or targets == ALL_LINEAR:
      return targets
    if not isinstance(targets, str):
      return set(self._names(name))
    return self._compiled(name, targets, targets)

  def _compiled(self, name: str, expression: str, text: str) -> Pattern | None:
    """The compiled `expression`; None, and a problem, if it is invalid."""
    pattern = compiled(expression, text)
    if pattern is None:
      self.problem(f"{name}: {shortened(text)} is not a valid regular expression of at most {LONGEST:,} characters")
    else:
      self.patterns.append((name, pattern))
    return pattern

  def _token_rows(self) -> dict[str, list[int]]:
    """The token ids in `trainable_token_indices`, by module name; '' is the token embedding."""
    given = self.values.get("trainable_token_indices") or {}
    ids_by_name = {"": given} if isinstance(given, list) else given
    if not isinstance(ids_by_name, dict) or not all(map(_is_token_list, ids_by_name.values())):
      self.problem(f"trainable_token_indices={shortened(given)}: must be a list of token ids, or a mapping to lists")
      return {}
    return ids_by_name


def _is_token_list(value: Any) -> bool:
  """Whether `value` is a list of token ids without repetition."""
  if not isinstance(value, list) or not all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value):
    return False
  return len(set(value)) == len(value)


def shortened(value: Any, longest: int = 60) -> str:
  """Returns `value` as text on one line, with at most `longest` characters."""
  if isinstance(value, (list, dict)) and len(value) > 4:
    value = f"a {'list' if isinstance(value, list) else 'mapping'} of {len(value)}"
  text = "null" if value is None else str(value)
  if isinstance(value, bool):
    text = text.lower()
  return repr(text if len(text) <= longest else f"{text[: longest - 3]}...")[1:-1]

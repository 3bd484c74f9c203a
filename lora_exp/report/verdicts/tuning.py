"""Tuned keys such as the learning rate: which value is best, and whether enough values were tried to know."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_exp.report.grouping.group import Group, sort_key
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import key_value, short_name, value_text

SEEDS_NEEDED = 3
VALUES_NEEDED = 3  # of a tuned key, where each setting was tried at its own values
# Keys that are tuned: settings are compared at their own best value of each.
TUNED = ("optim.", "lora.alpha", "lora.lr_ratio", "lora.dropout", "lora.init_std", "train.batch_size")


def is_tuned(key: str) -> bool:
  return key.startswith(TUNED)


def contexts(group: Group, key: str, ignore: Iterable[str] = ()) -> list[tuple[str, list[Setting]]]:
  """(words, settings) for each combination of the keys that are neither `key`, nor tuned, nor in `ignore`.

  Only combinations in which `key` has several values.
  """
  fixed = [k for k in group.keys if k != key and not is_tuned(k) and k not in set(ignore)]
  found: dict[tuple, list[Setting]] = {}
  for setting in group.adapted:
    if key in setting.values:
      found.setdefault(tuple((k, setting.values.get(k)) for k in fixed), []).append(setting)
  return [(_words(values), settings) for values, settings in found.items()
          if len({s.values[key] for s in settings}) > 1]


def _words(values: Iterable[tuple[str, Any]]) -> str:
  return ", ".join(key_value(key, value) for key, value in values if value is not None)


def best_of(settings: Iterable[Setting]) -> Setting:
  """The best setting of those with SEEDS_NEEDED seeds, or else with the most."""
  settings = list(settings)
  seeds = min(SEEDS_NEEDED, max(s.seeds for s in settings))
  return min((s for s in settings if s.seeds >= seeds), key=penalty)


def best_by(settings: Iterable[Setting], key: str) -> dict[Any, Setting]:
  """Value of `key` -> its best setting, by value."""
  by_value: dict[Any, list[Setting]] = {}
  for setting in settings:
    by_value.setdefault(setting.values[key], []).append(setting)
  return {value: best_of(by_value[value]) for value in sorted(by_value, key=sort_key)}


def unevenly_tuned(group: Group, settings: Sequence[Setting], ignore: str) -> list[str]:
  """Tuned keys (but `ignore`) that settings were tried at different values of, some at too few to find the best."""
  problems = []
  for key in group.keys:
    if not is_tuned(key) or key == ignore:
      continue
    tried = [{repr(other.values[key]) for other in _line(group, s, key)} for s in settings if key in s.values]
    fewest = min(tried, key=len, default=set())
    if tried and len(fewest) < VALUES_NEEDED and any(values != fewest for values in tried):
      problems.append(
        f"each was tried at its own values of {short_name(key)}, which were as few as {len(fewest)}, and "
        f"{VALUES_NEEDED} are needed to find a best one"
      )
  return problems


def at_edges(group: Group, setting: Setting, tolerance: float = 0.0, ignore: str = "") -> list[str]:
  """Tuned keys (but `ignore`) whose best value is the lowest or highest tried while the metric still improves there.

  It is flat there if it is within `tolerance` (in the unit of the metric) of that of the next value.
  """
  problems = []
  for key, value in setting.values.items():
    if not is_tuned(key) or key == ignore:
      continue
    line = {s.values[key]: s for s in reversed(_line(group, setting, key)) if isinstance(s.values[key], int | float)}
    values = sorted(line)
    if len(values) < 2 or value not in (values[0], values[-1]):
      continue
    lowest = value == values[0]
    neighbour = line[values[1] if lowest else values[-2]]
    if _improves(neighbour, setting, tolerance):
      others = {k: v for k, v in setting.values.items() if k != key}
      name = ", ".join(key_value(k, v) for k, v in others.items()) or setting.label
      problems.append(f"the best {short_name(key)} of {name} is the {'lowest' if lowest else 'highest'} tried "
                      f"({short_name(key)} {value_text(value)})")
  return problems


def _improves(neighbour: Setting, setting: Setting, tolerance: float) -> bool:
  """Whether `setting` is better than its neighbour by more than `tolerance`; by the trials that tuned if need be."""
  if neighbour.seeds:
    return neighbour.penalty - setting.penalty > tolerance
  before, after = neighbour.tuning_penalty, setting.tuning_penalty
  return before is None or after is None or before - after > tolerance


def _line(group: Group, setting: Setting, key: str) -> list[Setting]:
  """The settings that differ from `setting` in `key` at most."""
  others = _without(setting.values, key)
  return [s for s in group.settings if key in s.values and _without(s.values, key) == others]


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
  return {k: v for k, v in values.items() if k != key}

"""Tuned settings such as the learning rate: which value is best, and whether enough values were tried."""

from collections.abc import Iterable, Sequence
from typing import Any

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import say, word

SEEDS_NEEDED = 3
VALUES_NEEDED = 3  # of a rate, where each setting was tried at its own
# What is tuned, as a rate is: settings are compared at their own best of these.
TUNED = ("optim.", "lora.alpha", "lora.lr_ratio", "lora.dropout", "lora.init_std", "train.batch_size")


def is_tuned(key: str) -> bool:
  return key.startswith(TUNED)


def contexts(group: Group, key: str, apart_from: Iterable[str] = ()) -> list[tuple[str, list[Setting]]]:
  """(words, settings) for each combination of what is neither `key`, nor tuned, nor in `apart_from`."""
  held = [k for k in group.keys if k != key and not is_tuned(k) and k not in set(apart_from)]
  found: dict[tuple, list[Setting]] = {}
  for setting in group.adapted:
    if key in setting.values:
      found.setdefault(tuple((k, setting.values.get(k)) for k in held), []).append(setting)
  words = lambda at: ", ".join(say(k, v) for k, v in at if v is not None)
  return [(words(at), settings) for at, settings in found.items() if len({s.values[key] for s in settings}) > 1]


def best_of(settings: Iterable[Setting]) -> Setting:
  """The best mean among those with the most seeds (three are the most that is asked)."""
  settings = list(settings)
  most = min(SEEDS_NEEDED, max(s.seeds for s in settings))
  return min((s for s in settings if s.seeds >= most), key=lambda s: s.penalty)


def best_by(settings: Iterable[Setting], key: str) -> dict[Any, Setting]:
  """Value of `key` -> its best setting, in the order of the values."""
  groups: dict[Any, list[Setting]] = {}
  for setting in settings:
    groups.setdefault(setting.values[key], []).append(setting)
  order = sorted(groups, key=lambda v: (isinstance(v, str), v))
  return {value: best_of(groups[value]) for value in order}


def untuned(group: Group, settings: Sequence[Setting], apart_from: str) -> list[str]:
  """Where settings were tried at other rates (or other tuned numbers) each, and some at too few to find their best."""
  found = []
  for key in (k for k in group.keys if is_tuned(k) and k != apart_from):
    tried = [(s, {repr(t.values[key]) for t in _line(group, s, key)}) for s in settings if key in s.values]
    least = min(tried, key=lambda pair: len(pair[1]), default=None)
    if least and len(least[1]) < VALUES_NEEDED and any(values != least[1] for _, values in tried):
      found.append(f"each was tried at its own values of {word(key)}, which were as few as {len(least[1])}, and "
                   f"{VALUES_NEEDED} are needed to find a best one")  # fmt: skip
  return found


def _line(group: Group, setting: Setting, key: str) -> list[Setting]:
  """The settings that differ from `setting` in `key` at most."""
  rest = lambda s: {k: v for k, v in s.values.items() if k != key}
  return [s for s in group.settings if key in s.values and rest(s) == rest(setting)]


def edges(group: Group, setting: Setting, tolerance: float = 0.0, apart_from: str = "") -> list[str]:
  """Where the best rate (or another tuned number) lies on the edge of what was tried, and still improves there.

  A neighbour within the tolerance is no matter: the curve is flat, and going on would gain less again.
  """
  found = []
  for key in (k for k in setting.values if is_tuned(k) and k != apart_from):
    value = setting.values[key]
    line = _line(group, setting, key)
    numeric = sorted({s.values[key] for s in line if isinstance(s.values[key], int | float)})
    if len(numeric) < 2 or value not in (numeric[0], numeric[-1]):
      continue
    inner = numeric[1] if value == numeric[0] else numeric[-2]
    neighbour = next(s for s in line if s.values[key] == inner)
    rest = setting.label if len(setting.values) == 1 else ", ".join(
      say(k, v) for k, v in setting.values.items() if k != key)
    if not neighbour.seeds or neighbour.penalty - setting.penalty > tolerance:
      end = "lowest" if value == numeric[0] else "highest"
      found.append(f"the best {say(key, value).rpartition(' ')[0]} of {rest} is the {end} tried ({say(key, value)})")
  return found

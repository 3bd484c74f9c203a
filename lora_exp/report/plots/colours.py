"""Colours and shapes of settings: a colour map for numbers, a palette for words."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import METHOD, RANK, key_value

INK, MUTED, GRID = "#222222", "#5f666d", "#dddddd"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f6000", "#555555")
BEST = PALETTE[1]
FULL, FROZEN = "#222222", "#888888"  # the reference lines
# full fine-tuning is a square
SHAPES = ("circle", "diamond", "triangle-up", "triangle-down", "cross", "triangle-right", "triangle-left")
# matplotlib's viridis from 5 to 85 % of its length: its light end is illegible on white
VIRIDIS = ("#471164", "#472f7d", "#3e4a89", "#32648e", "#287c8e", "#20938c", "#2fb47c", "#5cc863", "#a0da39")
LINES = 0.78  # of it: thin lines and small points need more contrast


class Colours:
  """The colours of a group's settings: by rank if it varies, else by the first key that does."""

  def __init__(self, group: Group):
    first = METHOD if is_decided(group, RANK, METHOD) else RANK
    keys = [k for k in (first, *group.keys) if k in group.keys and len(group.levels(k)) > 1]
    self.key: str | None = keys[0] if keys else None
    self.levels = group.levels(self.key) if self.key else []
    self.present = [level for level in self.levels if level is not None]
    self.numeric = len(self.present) > 1 and all(isinstance(v, int | float) for v in self.present)

  def name(self, setting: Setting) -> str:
    """The entry of the legend that a setting belongs to."""
    if setting.method.is_reference:
      return setting.label if self.key is None else ("full" if setting.method.trains_everything else "frozen")
    return key_value(self.key, setting.values[self.key]) if self.key and self.key in setting.values else setting.label

  def of(self, setting: Setting) -> str:
    """The colour of a setting."""
    if setting.method.is_reference:
      return FULL if setting.method.trains_everything else FROZEN
    return self.of_level(setting.values[self.key]) if self.key and self.key in setting.values else PALETTE[0]

  def of_level(self, value: Any) -> str:
    """The colour of one value of `key`. Beside numbers, null has a colour of its own."""
    if not self.numeric:
      return PALETTE[self.levels.index(value) % len(PALETTE)]
    return BEST if value is None else viridis(LINES * self.present.index(value) / (len(self.present) - 1))


def viridis(share: float) -> str:
  """The colour at `share` (0 to 1) of the colour map, as #rrggbb."""
  channels = np.array([[int(text[i : i + 2], 16) for i in (1, 3, 5)] for text in VIRIDIS], dtype=float)
  at = np.linspace(0, 1, len(VIRIDIS))
  return "#" + "".join(f"{round(float(np.interp(share, at, channel))):02x}" for channel in channels.T)


def evenly_picked(values: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the values, including the first and the last."""
  return list(values) if len(values) <= most else [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]


def is_decided(group: Group, key: str, by: str) -> bool:
  """Whether each value of `by` goes with one value of `key`, or none."""
  pairs = {(s.values[by], s.values.get(key)) for s in group.settings if by in s.values and not s.method.is_reference}
  return len(pairs) == len({value for value, _ in pairs}) > 0


def shape_key(group: Group, colours: Colours) -> str | None:
  """The key that shapes show beside the colours: words before numbers; None if no other key varies."""
  keys = [k for k in group.keys if k != colours.key and not is_decided(group, k, colours.key or "")
          and 1 < len(group.levels(k)) <= len(SHAPES)]
  return next((k for k in keys if isinstance(group.levels(k)[-1], str)), keys[0] if keys else None)

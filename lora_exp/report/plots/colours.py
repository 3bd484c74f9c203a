"""Colours and markers of settings: a colour map for numbers, a palette for words."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import METHOD, RANK, key_value

INK, MUTED, GRID = "#222222", "#666666", "#d9d9d9"
# The palette of Okabe and Ito, which is suitable for colour-blind readers.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f6000", "#555555")
BEST = PALETTE[1]
FULL, FROZEN = "#222222", "#888888"  # the reference lines
MARKERS = "osD^vPX*<>hp"


class Colours:
  """The colours of a group's settings: by rank if it varies, else by the first key that does."""

  def __init__(self, group: Group):
    first = METHOD if is_decided(group, RANK, METHOD) else RANK
    keys = [k for k in (first, *group.keys) if k in group.keys and len(group.levels(k)) > 1]
    self.key: str | None = keys[0] if keys else None
    self.levels = group.levels(self.key) if self.key else []
    self.numeric = len(self.levels) > 1 and all(isinstance(v, int | float) for v in self.levels)

  def of(self, setting: Setting) -> Any:
    """The colour of a setting."""
    if setting.method.is_reference:
      return FULL if setting.method.trains_everything else FROZEN
    return self.of_level(setting.values.get(self.key)) if self.key and self.key in setting.values else PALETTE[0]

  def of_level(self, value: Any) -> Any:
    """The colour of one value of `key`."""
    position = self.levels.index(value)
    if not self.numeric:
      return PALETTE[position % len(PALETTE)]
    return matplotlib.colormaps["viridis"](0.05 + 0.8 * position / max(1, len(self.levels) - 1))

  def handles(self, most: int = 12) -> list[Line2D]:
    """A legend of the levels, at most `most` of them."""
    return [Line2D([], [], color=self.of_level(v), lw=2.4, label=key_value(self.key or "", v))
            for v in evenly_picked(self.levels, most)]


def evenly_picked(values: Sequence[Any], most: int) -> list[Any]:
  """At most `most` of the values, including the first and the last."""
  return list(values) if len(values) <= most else [values[round(i)] for i in np.linspace(0, len(values) - 1, most)]


def is_decided(group: Group, key: str, by: str) -> bool:
  """Whether each value of `by` has at most one value of `key`."""
  pairs = {(s.values[by], s.values.get(key)) for s in group.settings if by in s.values and not s.method.is_reference}
  return len(pairs) == len({value for value, _ in pairs}) > 0


def marker_key(group: Group, colours: Colours) -> str | None:
  """The key shown by markers in addition to colours, preferably not numeric; None if no other key varies."""
  keys = [k for k in group.keys if k != colours.key and not is_decided(group, k, colours.key or "")
          and 1 < len(group.levels(k)) <= len(MARKERS)]
  return next((k for k in keys if isinstance(group.levels(k)[0], str)), keys[0] if keys else None)


def markers(group: Group, colours: Colours) -> dict[Any, str]:
  """A marker for each level of `marker_key`."""
  key = marker_key(group, colours)
  return {} if key is None else {v: MARKERS[i % len(MARKERS)] for i, v in enumerate(group.levels(key))}

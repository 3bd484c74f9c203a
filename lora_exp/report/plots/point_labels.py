"""Names beside points, where they cover neither a point nor another name."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from lora_exp.report.plots.colours import INK
from lora_exp.report.plots.figure import HEIGHT, LETTER, NARROW, WIDTH, chart

LINE = 15  # pixels of a line's height
LONGEST = 34  # letters
PLACES = ((9, -5, "left"), (9, 14, "left"), (-9, -5, "right"), (-9, 14, "right"), (0, -12, "center"), (0, 22, "center"))
Box = tuple[float, float, float, float]  # left, top, right, bottom


def name_points(points: Sequence[tuple[float, float, str]], x: dict[str, Any], y: dict[str, Any],
                others: Sequence[tuple[float, float]] = (), lines: Mapping[str, float | None] | None = None
                ) -> list[alt.Chart]:
  """Labels of (x, y, name); one without room is left out, and all are where the panel is narrow.

  `x` and `y`: the arguments of the axes. Labels cover neither the points `others` nor the names of the reference
  `lines`, which stand above them on the right.
  """
  at = [(_pixel(px, x, WIDTH), HEIGHT - _pixel(py, y, HEIGHT)) for px, py in [*((a, b) for a, b, _ in points), *others]]
  taken: list[Box] = [(left - 5, top - 5, left + 5, top + 5) for left, top in at]
  for name, value in (lines or {}).items():
    if value is not None:
      taken.append(_box(WIDTH, HEIGHT - _pixel(value, y, HEIGHT) - 3, name, "right"))
  rows = []
  for (px, py, name), (left, top) in zip(points, at, strict=False):
    text = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
    for dx, dy, align in PLACES:
      box = _box(left + dx, top + dy, text, align)
      inside = box[0] >= 0 and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT
      if inside and not any(_overlap(box, other) for other in taken):
        rows.append({"x": px, "y": py, "name": text, "dx": dx, "dy": dy, "align": align})
        taken.append(box)
        break
  if not rows:
    return []
  mark = chart(rows).mark_text(
    dx=alt.ExprRef("datum.dx"), dy=alt.ExprRef("datum.dy"), align=alt.ExprRef("datum.align"), color=INK,
    baseline="alphabetic", opacity=alt.ExprRef(f"width < {NARROW} ? 0 : 1"))
  return [mark.encode(x=alt.X(**x), y=alt.Y(**y), text="name:N")]


def _pixel(value: float, axis: dict[str, Any], size: int) -> float:
  """The place of a value on an axis of `size` pixels; the middle if the range of the axis is not known."""
  scale = axis["scale"].to_dict()
  if "domain" not in scale:
    return size / 2
  low, high = scale["domain"]
  if scale.get("type") == "log":
    low, high, value = (float(np.log(v)) for v in (low, high, value))
  return size * (value - low) / (high - low)


def _box(left: float, top: float, text: str, align: str) -> Box:
  width = LETTER * len(text)
  start = left - {"left": 0.0, "right": 1.0, "center": 0.5}[align] * width
  return start, top - LINE + 3, start + width, top + 3


def _overlap(a: Box, b: Box) -> bool:
  return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

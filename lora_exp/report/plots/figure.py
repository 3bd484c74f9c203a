"""A figure of the report: Vega-Lite charts under a title that is a sentence.

Each chart is defined once, with Altair. `vl_convert` renders it offline as SVG and PNG, and the page's own script makes
it interactive.
"""

import hashlib
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt
import vl_convert

from lora_exp.report.plots.colours import GRID, INK, MUTED

WIDTH = 720  # pixels of all panels of a picture
GAP = 60  # between two panels
HEIGHT = 300
LETTER = 6.5  # width of a letter
SCALE = 2.0  # pixels of a PNG for a pixel of the page
TITLE_WIDTH = 92  # characters of a line
CLIP = re.compile(r"\bclip\d+\b")  # the id of a clip path
NO_BREAK = re.compile(r" ± |(?<=rank) (?=\d)|(?<=lr) (?=\d)")  # where a title keeps its spaces
FONT = "system-ui, sans-serif"
NARROW = 430  # width of a panel in pixels below which labels are left out
THEME: dict[str, Any] = {
  "font": FONT,
  "axis": {"labelFontSize": 12, "titleFontSize": 13, "titleFontWeight": "normal", "labelColor": MUTED, "tickCount": 6,
           "titleColor": INK, "gridColor": GRID, "domainColor": MUTED, "tickColor": MUTED, "labelOverlap": "greedy"},
  "legend": {"orient": "bottom", "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal",
             "labelColor": INK, "titleColor": INK, "labelLimit": 260, "direction": "horizontal", "symbolOpacity": 1,
             "layout": {"bottom": {"direction": "vertical", "anchor": "start", "margin": 4}}},
  "title": {"fontSize": 15, "anchor": "start", "color": INK, "offset": 14},
  "text": {"fontSize": 12, "color": INK},
  "view": {"stroke": None},
}


@dataclass(frozen=True)
class Figure:
  """Charts in a row."""

  title: str
  panels: tuple[alt.LayerChart, ...]
  note: str = ""  # how to read it, in a sentence or two
  entries: tuple[str, ...] = ()  # of the legends; the longest decides how many fit beside each other
  width: int = WIDTH  # pixels of all panels

  @property
  def heading(self) -> str:
    """The title with a capital letter."""
    return self.title[:1].upper() + self.title[1:]

  @cached_property
  def specs(self) -> list[dict[str, Any]]:
    """The Vega-Lite specification of each panel, for the page."""
    return [_spec(panel.properties(width=self._panel_width)) | {"usermeta": {"entry": self._entry}}
            for panel in self.panels]

  @cached_property
  def svg(self) -> str:
    """The panels in a row under the title, on white."""
    sized = [panel.properties(width=self._panel_width) for panel in self.panels]
    row = sized[0] if len(sized) == 1 else alt.hconcat(*sized, spacing=GAP // 3)
    spec = _spec(row.properties(title=_lines(self.heading)))
    spec["config"] = THEME | {"legend": THEME["legend"] | {"columns": max(1, self._panel_width // self._entry)}}
    return _renumber_clips(vl_convert.vegalite_to_svg(spec | {"background": "white", "padding": 8}))

  @property
  def png(self) -> bytes:
    """`svg` as PNG; the same bytes for the same figure."""
    return vl_convert.svg_to_png(self.svg, scale=SCALE)

  @property
  def _entry(self) -> int:
    """Width in pixels of the widest entry of the legends."""
    return round(LETTER * max(map(len, self.entries), default=0)) + 40

  @property
  def _panel_width(self) -> int:
    return (self.width - GAP * (len(self.panels) - 1)) // len(self.panels)


def _renumber_clips(svg: str) -> str:
  """Numbers the clip paths of a picture from 0, after a hash of the picture: Vega counts them over a whole process.

  Equal figures then have equal bytes, and no two figures of a page share an id.
  """
  digest = hashlib.sha256(CLIP.sub("clip", svg).encode()).hexdigest()[:8]
  numbers = {name: n for n, name in enumerate(dict.fromkeys(CLIP.findall(svg)))}
  return CLIP.sub(lambda match: f"clip-{digest}-{numbers[match[0]]}", svg)


def layered(layers: Sequence[alt.Chart], height: int = HEIGHT) -> alt.LayerChart:
  """One panel of charts over each other, the first at the bottom; `height` in pixels."""
  return alt.LayerChart(layer=list(layers), height=height)


def chart(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
  """A chart of rows. They are kept as JSON text: Altair copies lists with every change of a chart."""
  finite = [{key: _finite(value) for key, value in row.items()} for row in rows]
  return alt.Chart(alt.Data(values=json.dumps(finite)))


def _finite(value: Any) -> Any:
  """None for a NaN or an infinity, which JSON does not have."""
  return None if isinstance(value, float) and not math.isfinite(value) else value


def _spec(drawn: alt.TopLevelMixin) -> dict[str, Any]:
  """The specification with the theme, and with each table of rows once, under a name."""
  spec = drawn.to_dict(validate=False) | {"config": THEME, "background": "transparent"}
  names: dict[str, str] = {}
  _name_data(spec, names)
  return spec | {"datasets": {name: json.loads(rows) for rows, name in names.items()}}


def _name_data(node: dict[str, Any], names: dict[str, str]) -> None:
  """Replaces the rows of `node` and of the charts in it by their name; `names`: rows as JSON text -> name."""
  rows = node.get("data", {}).get("values")
  if rows is not None:
    node["data"] = {"name": names.setdefault(rows, f"rows{len(names)}")}
  for part in (*node.get("layer", ()), *node.get("hconcat", ())):
    _name_data(part, names)


def _lines(title: str) -> list[str]:
  """A title in lines of about one length."""
  title = NO_BREAK.sub(_no_break, title)
  count = len(textwrap.wrap(title, TITLE_WIDTH))
  even = TITLE_WIDTH if count < 2 else min(TITLE_WIDTH, len(title) // count + 10)  # no last line of one word
  return textwrap.wrap(title, even)


def _no_break(match: re.Match[str]) -> str:
  return match[0].replace(" ", "\xa0")

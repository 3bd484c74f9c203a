"""The rows of a bench's result: what was measured, in base units for the file and readable units for the table."""

from collections.abc import Iterable
from dataclasses import dataclass

from lora_exp.runtime import console
from lora_exp.train.benchmarks.turns import Spread

DIGITS = 6  # significant digits in bench.json


@dataclass(frozen=True)
class Row:
  """One measured value of a part."""

  part: str  # of bench.parts
  key: str  # in bench.json; it ends in the unit
  label: str  # in the table, with the unit
  value: Spread | float | int | str | None
  scale: float = 1.0  # of the value in the table

  def to_json(self) -> object:
    """The value with six significant digits; median, low and high of a spread."""
    if isinstance(self.value, Spread):
      return {name: _rounded(value) for name, value in vars(self.value).items()}
    return _rounded(self.value) if isinstance(self.value, float) else self.value

  def cells(self) -> tuple[str, str, str]:
    """The label, the value (the median of a spread) and the quartiles."""
    if isinstance(self.value, Spread):
      middle, low, high = (console.cell(x * self.scale) for x in vars(self.value).values())
      return self.label, middle, f"{low} to {high}"
    value = self.value * self.scale if isinstance(self.value, float | int) else self.value
    return self.label, console.cell(value), ""


def _rounded(value: float) -> float:
  return float(f"{value:.{DIGITS}g}")


def to_json(rows: Iterable[Row]) -> dict[str, dict[str, object]]:
  """The values by part and key."""
  parts: dict[str, dict[str, object]] = {}
  for row in rows:
    parts.setdefault(row.part, {})[row.key] = row.to_json()
  return parts


def show_rows(title: str, rows: Iterable[Row]) -> None:
  """Prints the table; the name of a part is in its first row."""
  lines, last = [], ""
  for row in rows:
    lines.append((row.part if row.part != last else "", *row.cells()))
    last = row.part
  console.show_table(title, ("part", "", "median", "quartiles"), lines, right=("median",))

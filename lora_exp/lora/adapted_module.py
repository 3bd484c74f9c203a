"""A row of the table of adapted modules, which every run prints."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdaptedModule:
  """One adapted module: its kernel's shape, its rank and its scale."""

  path: str
  fan_in: int  # I
  fan_out: int  # O
  rank: int  # R; 1 for a method without ranks
  alpha: float
  scale: float
  parameters: int = 0  # trained ones
  has_bias: bool = field(default=False, compare=False)  # a fact of the model

  def sizes(self) -> dict[str, int]:
    """The length of each axis letter: I, O and R."""
    return {"I": self.fan_in, "O": self.fan_out, "R": self.rank}

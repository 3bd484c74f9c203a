"""The entry of one module in the table of adapted modules, which every run prints."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AdaptedModule:
  """One adapted module: the shape of its kernel, its rank and its scale."""

  path: str  # dotted
  fan_in: int  # I
  fan_out: int  # O
  rank: int  # R; 1 if the method has no ranks
  alpha: float
  scale: float
  parameters: int = 0  # number of trained parameters
  kernels: tuple[int, ...] | None = None  # numbers of the adapted kernels of a stack, such as experts; None: all
  has_bias: bool = field(default=False, compare=False)  # a property of the model, not of the adapter

  @property
  def label(self) -> str:
    """The path, with the numbers of the adapted kernels if these are not all: `mlp.experts[0,3].down_proj`."""
    if self.kernels is None:
      return self.path
    parent, _, name = self.path.rpartition(".")
    return f"{parent}[{','.join(map(str, self.kernels))}].{name}"

  def sizes(self) -> dict[str, int]:
    """The sizes of the axes I, O and R."""
    return {"I": self.fan_in, "O": self.fan_out, "R": self.rank}

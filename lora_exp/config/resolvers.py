"""Functions for interpolations in the YAML files under `conf/`, such as `${least:${model.max_len},256}`."""

from omegaconf import OmegaConf


def least(*numbers: float) -> float:
  """The smallest of several numbers."""
  return min(numbers)


def times(a: float, b: float) -> float:
  """a·b rounded to six digits, so that 0.1 × 0.005 is 0.0005."""
  return float(f"{a * b:.6g}")


def size_name(rank: int, parameters: float | None) -> str:
  """The size of an adapter in a run's name: r8 for a rank, p294912 for a number of parameters."""
  return f"r{rank}" if parameters is None else f"p{parameters:g}"


def register_resolvers() -> None:
  """Registers the functions with OmegaConf; may be called more than once."""
  OmegaConf.register_new_resolver("least", least, replace=True)
  OmegaConf.register_new_resolver("times", times, replace=True)
  OmegaConf.register_new_resolver("size", size_name, replace=True)

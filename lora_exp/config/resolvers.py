"""Functions for interpolations in the YAML files under `conf/`, such as `${least:${model.max_len},256}`."""

from typing import Any

from omegaconf import OmegaConf


def least(*numbers: Any) -> Any:
  """The smallest of the numbers, or the first value that is not a number, which the check of its setting reports."""
  others = [x for x in numbers if not _is_number(x)]
  return others[0] if others else min(numbers)


def times(a: Any, b: Any) -> Any:
  """a·b rounded to six digits, so that 0.1 × 0.005 is 0.0005; `a` or `b` if that is not a number."""
  if _is_number(a) and _is_number(b):
    return float(f"{a * b:.6g}")
  return b if _is_number(a) else a


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def size_name(rank: int, parameters: float | None) -> str:
  """The size of an adapter in a run's name: r8 for a rank, p294912 for a number of parameters."""
  return f"r{rank}" if parameters is None else f"p{parameters:g}"


def register_resolvers() -> None:
  """Registers the functions with OmegaConf; may be called more than once."""
  OmegaConf.register_new_resolver("least", least, replace=True)
  OmegaConf.register_new_resolver("times", times, replace=True)
  OmegaConf.register_new_resolver("size", size_name, replace=True)

"""Problems of the group `lora` that do not depend on the method; lora/method_checks.py has the others."""

import re
from collections.abc import Iterator
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.number_ranges import POSITIVE, RANK
from lora_exp.config.schema import Config


def lora_problems(cfg: Config) -> Iterator[str]:
  """Problems of the group `lora`, one line each."""
  lora = cfg.lora
  for name in ("targets", "exclude", "train_modules"):
    yield from pattern_problems(f"lora.{name}", getattr(lora, name))
  if lora.compute == "merged" and lora.dropout:
    yield f"lora.compute=merged: needs lora.dropout=0, and it is {lora.dropout}; change one of them"
  if lora.compute == "merged" and "bfloat16" in (cfg.model.dtype, cfg.model.param_dtype):
    yield "lora.compute=merged: adding A·B to a bfloat16 kernel rounds it away; use auto or factored"
  if lora.layers is not None:
    mlp = cfg.model.mlp if cfg.model.family == "mlp" else None
    yield from _layers(lora.layers, len(mlp.hidden) if mlp else cfg.model.layers)
  patterns = (("rank_pattern", lora.rank_pattern, RANK), ("alpha_pattern", lora.alpha_pattern, POSITIVE))
  for name, table, allowed in patterns:
    for pattern, value in (table or {}).items():
      yield from pattern_problems(f"lora.{name}", pattern)
      if value not in allowed:
        yield f"lora.{name}.{pattern}={value}: must be {allowed.words(value)}"
  if lora.quant and lora.compute == "merged":
    yield "lora.compute=merged: would keep a dense copy of each quantised kernel; use auto or factored"


def pattern_problems(path: str, patterns: Any) -> Iterator[str]:
  """Problems of target patterns."""
  items = patterns if isinstance(patterns, list) else [] if patterns is None else [patterns]
  for item in items:
    if not isinstance(item, str) or not item:
      yield f"{path}={shown(patterns)}: must be a pattern or a list of patterns, such as [query, value] or re:.*query"
      return
    if item.startswith("re:") and (problem := regex_problem(item)):
      yield f"{path}={shown(item)}: {problem}"


def _layers(layers: Any, count: int) -> Iterator[str]:
  if not isinstance(layers, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
    yield f"lora.layers={shown(layers)}: must be a list of block numbers such as [0,1], or null for all"
  elif not layers or any(not 0 <= i < count for i in layers):
    yield f"lora.layers={shown(layers)}: must be numbers of blocks from 0 to {count - 1}, or null for all"


def regex_problem(pattern: str) -> str | None:
  """Why the target pattern `re:...` is not a valid regular expression, or None."""
  try:
    re.compile(pattern.removeprefix("re:"))
  except re.error as error:
    return f"not a regular expression: {error}"
  return None

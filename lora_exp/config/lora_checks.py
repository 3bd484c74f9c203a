"""What is allowed of the adapter's settings, and which of them go together."""

import importlib.util
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.schema import ADAPTERS, Config, LoraConfig


def lora_problems(cfg: Config) -> Iterator[str]:
  """Problems of the group `lora`, a line each."""
  lora = cfg.lora
  for name in ("targets", "exclude", "train_modules"):
    yield from pattern_problems(f"lora.{name}", getattr(lora, name))
  if lora.method in ADAPTERS and not lora.targets:
    yield "lora.targets: must name at least one module; lora=frozen trains nothing"
  if lora.compute == "merged" and lora.dropout:
    yield f"lora.compute=merged: A sees other inputs than W with lora.dropout={lora.dropout}; set one of them back"
  if lora.compute == "merged" and "bfloat16" in (cfg.model.dtype, cfg.model.param_dtype):
    yield "lora.compute=merged: adding A·B to a bfloat16 kernel rounds it away; use auto or factored"
  if lora.layers is not None:
    mlp = cfg.model.mlp if cfg.model.family == "mlp" else None
    yield from _layers(lora.layers, len(mlp.hidden) if mlp else cfg.model.layers)
  for name, table, words, smallest in (("rank_pattern", lora.rank_pattern, "at least 1", 1),
                                       ("alpha_pattern", lora.alpha_pattern, "above 0", math.ulp(0.0))):
    for pattern, value in (table or {}).items():
      yield from pattern_problems(f"lora.{name}", pattern)
      if value < smallest:
        yield f"lora.{name}.{pattern}={value}: must be {words}"
  yield from _method(lora)
  yield from _parameters(lora)
  yield from _init_from(lora)


def _method(lora: LoraConfig) -> Iterator[str]:
  """Settings that a method has no use for would be silently ignored, and so are refused."""
  factors = lora.method in ADAPTERS
  if lora.method == "vera":
    for name, standard in (("alpha", None), ("rank_pattern", None), ("alpha_pattern", None), ("scaling", "standard")):
      if getattr(lora, name) != standard:
        yield f"lora.{name}={shown(getattr(lora, name))}: VeRA has one rank and no alpha; remove it"
  if lora.init in ("pissa", "olora") and lora.method != "lora":
    yield f"lora.init={lora.init}: goes with lora.method=lora alone, not with {lora.method}"
  if lora.method == "adalora" and lora.budget is None:
    yield "lora.budget=null: AdaLoRA needs the ranks that a module keeps on average, as lora.budget=8"
  elif lora.budget is not None and lora.method != "adalora":
    yield f"lora.budget={lora.budget:g}: is for lora=adalora; remove it"
  elif lora.budget is not None and lora.budget > lora.rank:
    yield f"lora.budget={lora.budget:g}: must be at most lora.rank={lora.rank}, which AdaLoRA starts from"
  if lora.method == "bitfit" and lora.bias == "none":
    yield "lora.bias=none: nothing is left to train with lora.method=bitfit; set lora.bias=all"
  if lora.bias == "lora_only" and not factors:
    yield f"lora.bias=lora_only: lora.method={lora.method} adapts no module; use all or none"
  if lora.lr_ratio != 1 and lora.method not in ("lora", "dora", "adalora"):
    yield f"lora.lr_ratio={lora.lr_ratio:g}: lora.method={lora.method} trains no A and B; set it back to 1"
  if lora.quant and not factors:
    yield f"lora.quant={lora.quant}: only kernels under adapters are quantised, and {lora.method} has none"
  elif lora.quant and importlib.util.find_spec("qwix") is None:
    yield f"lora.quant={lora.quant}: needs qwix: pip install 'lora_exp[quant]'"
  if lora.quant and lora.compute == "merged":
    yield "lora.compute=merged: would keep a dense copy of each quantised kernel; use auto or factored"
  if lora.method in ("full", "frozen"):
    for name, standard in (("bias", "none"), ("train_modules", None)):
      if getattr(lora, name) != standard:
        yield f"lora.{name}={shown(getattr(lora, name))}: has no meaning with lora.method={lora.method}; remove it"


def _parameters(lora: LoraConfig) -> Iterator[str]:
  """`lora.parameters` chooses the rank, and nothing else may; methods without adapters have no use for either."""
  if lora.parameters is None or lora.method not in ADAPTERS:
    return
  budget = f"lora.parameters={shown(lora.parameters)}"
  if lora.method == "adalora":
    yield f"{budget}: AdaLoRA chooses ranks itself, lora.budget on average; remove one of them"
  for name in ("rank_pattern", "init_from"):
    if getattr(lora, name) is not None:
      yield f"{budget}: chooses the rank, and lora.{name}={shown(getattr(lora, name))} does too; remove one of them"


def _init_from(lora: LoraConfig) -> Iterator[str]:
  if lora.init_from is None:
    return
  folder = Path(lora.init_from)
  if lora.method not in ADAPTERS:
    yield f"lora.init_from={lora.init_from}: lora.method={lora.method} has no adapter to start from"
  elif not folder.is_dir():
    yield f"lora.init_from={lora.init_from}: no such directory; give one with adapter_config.json"
  elif not (folder / "adapter_config.json").is_file():
    inner = " (a run's adapter lies in its folder adapter)" if (folder / "adapter").is_dir() else ""
    yield f"lora.init_from={lora.init_from}: holds no adapter_config.json{inner}"


def pattern_problems(path: str, patterns: Any) -> Iterator[str]:
  """What is wrong with target patterns."""
  items = patterns if isinstance(patterns, list) else [] if patterns is None else [patterns]
  for item in items:
    if not isinstance(item, str) or not item:
      yield f"{path}={shown(patterns)}: must be a pattern or a list of patterns, as [query, value] or re:.*query"
      return
    if item.startswith("re:") and (problem := regex_problem(item)):
      yield f"{path}={shown(item)}: {problem}"


def _layers(layers: Any, count: int) -> Iterator[str]:
  if not isinstance(layers, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
    yield f"lora.layers={shown(layers)}: must be a list of block numbers, as [0,1], or null for all"
  elif not layers or any(not 0 <= i < count for i in layers):
    yield f"lora.layers={shown(layers)}: must be numbers of blocks from 0 to {count - 1}, or null for all"


def regex_problem(pattern: str) -> str | None:
  """Why the target pattern `re:...` is no regular expression, or None."""
  try:
    re.compile(pattern.removeprefix("re:"))
  except re.error as error:
    return f"not a regular expression: {error}"
  return None

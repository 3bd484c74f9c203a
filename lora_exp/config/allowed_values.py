"""Allowed values of single settings: a table of choices, and the ranges of `number_ranges.py`."""

from collections.abc import Collection, Iterator
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.data_checks import sources
from lora_exp.config.errors import did_you_mean
from lora_exp.config.metrics import METRICS
from lora_exp.config.number_ranges import RANGES
from lora_exp.config.schema import Config

NULLABLE = ("report.metric",)  # settings that may be null though their choices are a registry
CHOICES: dict[str, Collection[str | None]] = {
  "format": ("peft", "gguf", "mlx", "merged", "gguf_merged", "base", "gguf_base"),
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.base": ("random", "pretrain", "weights"),
  "model.pretrain.optimizer": ("adamw", "muon"),
  "data.packing": ("pack", "pad", "stream"),
  "data.loss": ("assistant", "last", "all"),
  "data.split": ("halves", "none"),
  "data.chat": ("auto", "none"),
  "lora.scaling": ("standard", "rslora"),
  "lora.bias": ("none", "all", "lora_only"),
  "lora.quant": (None, "int8", "int4", "nf4"),
  "lora.compute": ("auto", "factored", "merged"),
  "optim.name": ("adamw", "adam", "sgd"),
  "optim.schedule": ("constant", "linear", "cosine"),
  "train.export": ("best", "last"),
  "train.on_nan": ("stop", "skip", "rewind"),
  "sample.chat": ("auto", "always", "none"),
  "report.metric": METRICS,
  "merge.dtype": (None, "float32", "bfloat16", "float16"),
  "export.gguf_type": ("f32", "f16", "q8_0"),
  "verify.backend": ("peft", "transformers", "llama_cpp", "url", "file"),
  "logger.mode": ("auto", "online", "offline"),
}


def choice_problems(cfg: Config) -> Iterator[str]:
  """Problems of settings whose value is not one of their choices."""
  for rule, choices in CHOICES.items():
    for path in _paths(cfg, rule):
      value = value_at(cfg, path)
      if value not in choices and not (value is None and rule in NULLABLE):
        yield choice_problem(path, value, choices)


def choice_problem(path: str, value: Any, choices: Collection[str | None]) -> str:
  """The problem of a value that is not one of `choices`, with the nearest choice."""
  words = [choice for choice in choices if choice is not None]
  return f"{path}={shown(value)}: choose {', '.join(map(shown, choices))}{did_you_mean(str(value), words)}"


def range_problems(cfg: Config) -> Iterator[str]:
  """Problems of numbers outside of their range."""
  for rule, allowed in RANGES.items():
    for path in _paths(cfg, rule):
      value = value_at(cfg, path)
      if value is not None and value not in allowed:
        yield f"{path}={shown(value)}: must be {allowed.words(value)}"


def value_at(cfg: Config, path: str) -> Any:
  """The value of the setting at a dotted path; None if a group on the path is null."""
  node: Any = cfg
  for name in path.split("."):
    node = getattr(node, name, None)
  return node


def _paths(cfg: Config, rule: str) -> list[str]:
  """The settings that a rule applies to: a rule for `data` applies to every data source of the run."""
  group, _, key = rule.partition(".")
  return [f"{source}.{key}" for source in sources(cfg)] if group == "data" else [rule]

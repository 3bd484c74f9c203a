"""Allowed values of single settings: a table of choices and a table of numeric ranges."""

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.data_checks import sources
from lora_exp.config.errors import did_you_mean
from lora_exp.config.metrics import METRICS
from lora_exp.config.schema import Config

NULLABLE = ("report.metric",)  # settings that may be null though their choices are a registry
CHOICES: dict[str, Collection[str | None]] = {
  "format": ("peft", "merged", "base"),
  "model.dtype": ("float32", "bfloat16"),
  "model.param_dtype": ("float32", "bfloat16"),
  "model.base": ("random", "pretrain", "weights"),
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
  "sample.chat": ("auto", "always", "none"),
  "report.metric": METRICS,
  "merge.dtype": (None, "float32", "bfloat16", "float16"),
  "logger.mode": ("auto", "online", "offline"),
}


@dataclass(frozen=True)
class Range:
  """An interval of allowed numbers, and its description in an error."""

  description: str
  low: float = -math.inf
  high: float = math.inf
  low_included: bool = True
  high_included: bool = True
  also: float | None = None  # one additional allowed value

  def __contains__(self, x: float) -> bool:
    above = x >= self.low if self.low_included else x > self.low
    below = x <= self.high if self.high_included else x < self.high
    return (above and below) or x == self.also


COUNT = Range("at least 1", low=1)
NOT_NEGATIVE = Range("0 or more", low=0)
POSITIVE = Range("above 0", low=0, low_included=False)
FRACTION = Range("between 0 and 1, both excluded", low=0, high=1, low_included=False, high_included=False)
PROBABILITY = Range("above 0 and at most 1", low=0, high=1, low_included=False)
RATE = Range("0 or more and below 1", low=0, high=1, high_included=False)
SEED = Range("between 0 and 4294967295", low=0, high=2**32 - 1)
AXIS_SIZE = Range("at least 1, or -1 for the devices that are left", low=1, also=-1)

RANGES: dict[str, Range] = {
  "seed": SEED,
  "model.layers": COUNT, "model.width": COUNT, "model.heads": COUNT, "model.ff": COUNT, "model.max_len": COUNT,
  "model.vocab_size": COUNT, "model.dropout": RATE, "model.seed": SEED, "model.adapter_lr": POSITIVE,
  "model.pretrain.steps": COUNT, "model.pretrain.batch_size": COUNT, "model.pretrain.lr": POSITIVE,
  "model.pretrain.warmup": NOT_NEGATIVE, "model.pretrain.weight_decay": NOT_NEGATIVE, "model.pretrain.clip": POSITIVE,
  "model.pretrain.dropout": RATE,
  "data.eval_fraction": FRACTION, "data.seq_len": COUNT, "data.limit": COUNT,
  "data.seed": SEED, "data.steps": COUNT,
  "data.teacher.rank": COUNT, "data.teacher.strength": POSITIVE, "data.teacher.seed": SEED,
  "mesh.data": AXIS_SIZE, "mesh.fsdp": AXIS_SIZE, "mesh.tensor": AXIS_SIZE, "mesh.trial": AXIS_SIZE,
  "lora.rank": COUNT, "lora.parameters": POSITIVE, "lora.alpha": POSITIVE, "lora.dropout": RATE,
  "lora.init_std": POSITIVE, "lora.lr_ratio": POSITIVE, "lora.lr_scale": POSITIVE, "lora.budget": POSITIVE,
  "optim.lr": POSITIVE, "optim.warmup": NOT_NEGATIVE, "optim.weight_decay": NOT_NEGATIVE, "optim.eps": POSITIVE,
  "optim.momentum": RATE, "optim.clip": POSITIVE, "optim.accumulate": COUNT,
  "train.steps": COUNT, "train.epochs": POSITIVE, "train.batch_size": COUNT, "train.log_every": COUNT,
  "train.eval_every": NOT_NEGATIVE, "train.eval_tokens": COUNT, "train.retain_tokens": COUNT,
  "train.save_every": NOT_NEGATIVE, "train.seed": SEED, "train.stop_at": COUNT,
  "eval.items": COUNT, "eval.max_tokens": COUNT, "eval.every": NOT_NEGATIVE,
  "sample.every": NOT_NEGATIVE, "sample.max_tokens": COUNT, "sample.temperature": NOT_NEGATIVE, "sample.top_k": COUNT,
  "sample.top_p": PROBABILITY, "sample.seed": SEED,
  "filter.days": NOT_NEGATIVE, "filter.rank": COUNT, "clean.days": NOT_NEGATIVE,
  "merge.bound": NOT_NEGATIVE, "report.margin": FRACTION,
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
        yield f"{path}={shown(value)}: must be {allowed.description}"


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

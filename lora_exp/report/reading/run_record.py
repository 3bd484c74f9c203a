"""One run of a sweep as its files describe it."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lora_exp.config.schema import EXAMPLES
from lora_exp.runtime.spectrum import Facts

SEEDS = ("train.seed", "data.seed", "model.seed")


@dataclass
class RunRecord:
  """One run of the sweep."""

  number: int
  path: str  # relative to the sweep
  status: str  # done | pruned | stopped | diverged | failed | unfinished | missing
  reason: str | None = None  # why it is not done, or not counted
  config: dict[str, Any] = field(default_factory=dict)  # by dotted path
  summary: dict[str, Any] = field(default_factory=dict)
  metrics: list[dict] = field(default_factory=list)
  learned: list[Facts] = field(default_factory=list)  # of each module; none where there is no adapter to read

  def __str__(self) -> str:
    return str(self.number)

  def number_at(self, *path: str) -> float | None:
    """The number at `path` of summary.json; None if there is none, or it is not finite."""
    node: Any = self.summary
    for name in path:
      node = node.get(name) if isinstance(node, dict) else None
    return node if isinstance(node, int | float) and not isinstance(node, bool) and math.isfinite(node) else None

  def learned_mean(self, name: str) -> float | None:
    """The mean over modules of a field of Facts."""
    found = [value for f in self.learned if (value := getattr(f, name)) is not None]
    return sum(found) / len(found) if found else None

  @property
  def method(self) -> str | None:
    """What trained it, in the name that people use."""
    return method_name(self.config) if self.config else None

  @property
  def base(self) -> float | None:
    """Held-out loss before training."""
    return self.number_at("losses", "base")

  @property
  def outcome(self) -> float | None:
    """The held-out loss that counts: of the exported state, the best one by default; of a frozen base its own."""
    if self.config.get("lora.method") == "frozen":
      return self.base
    return self.number_at("losses", "final" if self.config.get("train.export") == "last" else "best")

  @property
  def loss(self) -> float | None:
    """`outcome` of a trial that is done; None for any other, which no mean may hold."""
    return self.outcome if self.status == "done" else None

  def held_out(self, metric: str) -> float | None:
    """A metric of the exported state on held-out data; of a frozen base, its metric before training."""
    if metric == "loss":
      return self.outcome
    if self.config.get("lora.method") == "frozen":
      return self.base_metric(metric)
    if self.config.get("train.export") == "last":
      return self.number_at("scores", "final", metric)
    value = self.number_at("scores", "best", metric)
    return value if value is not None else dict(self.curve("eval", metric)).get(self.summary_step("best_step"))

  def base_metric(self, metric: str) -> float | None:
    """A metric on held-out data before training."""
    return self.base if metric == "loss" else self.number_at("scores", "base", metric)

  def result(self, metric: str) -> float | None:
    """`held_out` of a trial that is done; None for any other, which enters no mean."""
    return self.held_out(metric) if self.status == "done" else None

  def curve(self, split: str, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric on `split` (train, eval or retain), without values that are not finite."""
    rows = [row for row in self.metrics if row.get("split") == split]
    values = [(row["step"], row.get(metric)) for row in rows]
    return [(step, value) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]

  def summary_step(self, name: str) -> int:
    """A step of summary.json, as best_step; 0 if there is none."""
    return int(self.number_at("losses", name) or 0)

  @property
  def trainable(self) -> int | None:
    found = self.number_at("parameters", "trainable")
    return None if found is None else int(found)

  @property
  def seeds(self) -> tuple:
    """Values of SEEDS: trials that agree in all of them saw the same rows in the same order."""
    return tuple(self.config.get(key) for key in SEEDS)

  @property
  def numbers(self) -> bool:
    """Whether its data is examples of numbers, and its loss not in nats a token."""
    return self.config.get("data.source") in EXAMPLES

  @cached_property
  def curves(self) -> dict[str, list[tuple[int, float]]]:
    """Split -> (step, loss), without losses that are not finite."""
    return {split: self.curve(split, "loss") for split in ("train", "eval", "retain")}


def method_name(config: dict[str, Any]) -> str:
  """lora, dora, pissa, rslora, qlora, full, …: `lora.method`, told apart by the settings that make it another."""
  get = lambda key, default: default if config.get(f"lora.{key}") is None else config[f"lora.{key}"]
  method = str(get("method", "lora"))
  if method not in ("lora", "dora"):
    return method
  parts = [get("init", "kaiming")] if get("init", "kaiming") in ("pissa", "olora") else []
  parts += ["rslora"] * (get("scaling", "standard") == "rslora")
  parts += ["loraplus"] * (get("lr_ratio", 1.0) != 1)
  parts += ["qlora"] * bool(get("quant", None))
  return "+".join(([method] if method == "dora" else []) + parts) or "lora"

"""Checks of `bench`, the settings of task=bench."""

from collections.abc import Iterator

from lora_exp.config.errors import did_you_mean
from lora_exp.config.number_ranges import RANGES
from lora_exp.config.schema import Config

PARTS = ("step", "data", "eval", "generate", "startup", "pack")  # values of bench.parts


def bench_problems(cfg: Config) -> Iterator[str]:
  """Yields problems of the settings of task=bench, one line each; none for other tasks."""
  if cfg.task != "bench":
    return
  if not cfg.bench.parts:
    yield f"bench.parts=[]: nothing to measure; give some of {', '.join(PARTS)}"
  for name in cfg.bench.parts:
    if name not in PARTS:
      yield f"bench.parts: no such part {name}; choose {', '.join(PARTS)}{did_you_mean(name, PARTS)}"
  if cfg.bench.ranks is not None:
    yield from _rank_problems(cfg)
  if cfg.model.family == "mlp" and "generate" in cfg.bench.parts:
    yield "bench.parts: model.family=mlp generates no text; leave generate out: bench.parts=[step,data,eval,pack]"


def _rank_problems(cfg: Config) -> Iterator[str]:
  ranks = cfg.bench.ranks or []
  if not ranks:
    yield "bench.ranks=[]: give the ranks of the trials, or null for lora.rank"
  if len(ranks) > cfg.bench.pack:
    yield f"bench.ranks: {len(ranks)} ranks are more than the trials of the pack; set bench.pack={len(ranks)}"
  for rank in ranks:
    if rank not in RANGES["lora.rank"]:
      yield f"bench.ranks: {rank} is not a rank; it must be {RANGES['lora.rank'].words(rank)}"

"""Intervals of allowed numbers, and those of each numeric setting.

An upper limit refuses sizes that fit in no memory before anything is built, and numbers that float32 or an int32
counter cannot hold.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Range:
  """An interval of allowed numbers, and its description in an error."""

  description: str
  low: float = -math.inf
  high: float = math.inf
  low_included: bool = True
  high_included: bool = True
  also: float | None = None  # one additional allowed value
  most: float = math.inf  # a larger number is a mistake: it fits in no memory, or is not a number in float32

  def __contains__(self, x: float) -> bool:
    above = x >= self.low if self.low_included else x > self.low
    below = x <= self.high if self.high_included else x < self.high
    return (above and below and x <= self.most) or x == self.also

  def words(self, x: float) -> str:
    """Says what is allowed instead of `x`."""
    if x <= self.most:
      return self.description
    return f"at most {self.most:,}" if isinstance(self.most, int) else f"at most {self.most:g}"


MOST_FLOAT = 3e38  # below the largest number of float32
LEAST_FLOAT = 1e-37  # above the smallest normal number of float32


def count(most: int) -> Range:
  """A whole number from 1 to `most`."""
  return Range("at least 1", low=1, most=most)


def count_or_0(most: int) -> Range:
  """A whole number from 0 to `most`."""
  return Range("0 or more", low=0, most=most)


STEPS = count(2**31 - 1)  # counted in int32
STEPS_OR_0 = count_or_0(2**31 - 1)
TOKENS = count(10**15)
BATCH = count(2**20)
RANK = count(2**20)
WIDTH = count(2**20)  # features
HEADS = count(2**16)
MOST_LAYERS = 256  # the deepest published models have half as many
NOT_NEGATIVE = Range("0 or more", low=0, most=MOST_FLOAT)
POSITIVE = Range("above 0", low=0, low_included=False, most=MOST_FLOAT)
NORMAL = Range(f"above 0 (at least {LEAST_FLOAT:g})", low=LEAST_FLOAT, most=MOST_FLOAT)
FRACTION = Range("between 0 and 1, both excluded", low=0, high=1, low_included=False, high_included=False)
PROBABILITY = Range("above 0 and at most 1", low=0, high=1, low_included=False)
RATE = Range("0 or more and below 1", low=0, high=1, high_included=False)
SEED = Range("between 0 and 4294967295", low=0, high=2**32 - 1)
AXIS_SIZE = Range("at least 1, or -1 for the remaining devices", low=1, also=-1, most=2**20)

RANGES: dict[str, Range] = {
  "seed": SEED,
  "model.layers": count(MOST_LAYERS), "model.width": WIDTH, "model.heads": HEADS, "model.ff": count(2**22),
  "model.max_len": count(2**24), "model.vocab_size": count(2**24), "model.dropout": RATE, "model.seed": SEED,
  "model.adapter_lr": POSITIVE,
  "model.pretrain.steps": STEPS, "model.pretrain.batch_size": BATCH, "model.pretrain.lr": POSITIVE,
  "model.pretrain.warmup": STEPS_OR_0, "model.pretrain.weight_decay": NOT_NEGATIVE, "model.pretrain.clip": POSITIVE,
  "model.pretrain.dropout": RATE,
  "model.arch.kv_heads": HEADS, "model.arch.head_dim": count(2**16), "model.arch.window": count(2**24),
  "model.arch.rope_theta": POSITIVE, "model.arch.rope_local_theta": POSITIVE, "model.arch.norm_eps": NOT_NEGATIVE,
  "model.arch.query_scale": POSITIVE, "model.arch.attn_softcap": POSITIVE, "model.arch.logit_softcap": POSITIVE,
  "model.mlp.inputs": WIDTH, "model.mlp.outputs": WIDTH,
  "data.eval_fraction": FRACTION, "data.seq_len": count(2**24), "data.limit": TOKENS,
  "data.seed": SEED, "data.steps": STEPS, "data.repeat": count(10**7),
  "data.teacher.rank": RANK, "data.teacher.strength": POSITIVE, "data.teacher.seed": SEED,
  "mesh.data": AXIS_SIZE, "mesh.fsdp": AXIS_SIZE, "mesh.tensor": AXIS_SIZE, "mesh.trial": AXIS_SIZE,
  "distributed.processes": count(2**20), "distributed.process": count_or_0(2**20), "distributed.timeout": count(10**6),
  "lora.rank": RANK, "lora.parameters": Range("above 0", low=0, low_included=False, most=10**15),
  "lora.alpha": POSITIVE, "lora.dropout": RATE,
  "lora.init_std": POSITIVE, "lora.lr_ratio": POSITIVE, "lora.lr_scale": POSITIVE, "lora.budget": POSITIVE,
  "optim.lr": POSITIVE, "optim.warmup": STEPS_OR_0, "optim.weight_decay": NOT_NEGATIVE, "optim.eps": NORMAL,
  "optim.momentum": RATE, "optim.clip": POSITIVE, "optim.accumulate": BATCH,
  "train.steps": STEPS, "train.epochs": Range("above 0", low=0, low_included=False, most=10**6),
  "train.batch_size": BATCH, "train.log_every": STEPS,
  "train.eval_every": STEPS_OR_0, "train.eval_tokens": TOKENS, "train.retain_tokens": TOKENS,
  "train.save_every": STEPS_OR_0, "train.seed": SEED, "train.stop_at": STEPS,
  "harness_limit": TOKENS, "harness_shots": STEPS_OR_0,
  "eval.items": TOKENS, "eval.max_tokens": count(2**24), "eval.every": STEPS_OR_0,
  "sample.every": STEPS_OR_0, "sample.max_tokens": count(2**24), "sample.temperature": NOT_NEGATIVE,
  "sample.top_k": count(2**24), "sample.top_p": PROBABILITY, "sample.seed": SEED,
  "plan.devices": count(2**20), "filter.days": NOT_NEGATIVE, "filter.rank": RANK, "clean.days": NOT_NEGATIVE,
  "merge.bound": NOT_NEGATIVE, "export.rank": RANK, "verify.tolerance": POSITIVE, "report.margin": FRACTION,
  "bench.turns": count(1000), "bench.seconds": Range("above 0 and at most 600", low=0, high=600, low_included=False),
  "bench.pack": Range("at least 2", low=2, most=2**16),
}

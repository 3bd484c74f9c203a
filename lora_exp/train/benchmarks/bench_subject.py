"""What a bench measures: the composed model with its adapter, its data, and compiled steps on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from lora_exp.config import Config
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import train_batches
from lora_exp.data.rows import Rows, make_rows
from lora_exp.train.base import make_base
from lora_exp.train.compiled_step import CompiledStep, compile_step
from lora_exp.train.compute.program import Tree
from lora_exp.train.job import make_job
from lora_exp.train.plan import Plan, make_plan

STEPS = 1_000_000  # length of the learning rate's schedule, more than any bench trains


@dataclass(frozen=True)
class Subject:
  """The plan of a config, and everything that its measurements share."""

  plan: Plan

  @cached_property
  def base(self) -> Tree:
    """The arrays of the base."""
    return make_base(self.plan)[0]

  @cached_property
  def rows(self) -> Rows:
    """The tokenised data."""
    return make_rows(self.plan.cfg.data, self.plan.tokenizer, self.plan.cfg.cache)

  @property
  def tokens(self) -> int:
    """The tokens (or numeric examples) in a batch."""
    return self.plan.cfg.train.batch_size * (self.rows.seq_len if self.rows.vocab_size else 1)

  def first_batch(self, plan: Plan) -> Batch:
    """The first training batch of the data at the batch size of `plan`."""
    batches = train_batches(self.rows, plan.cfg.data, plan.cfg.train.batch_size)
    try:
      return next(batches)
    finally:
      batches.close()

  def at_rank(self, rank: int) -> Plan:
    """The plan of the same settings at another rank."""
    cfg = self.plan.cfg
    return make_plan(replace(cfg, lora=replace(cfg.lora, rank=rank, parameters=None)))

  def at_batch_size(self, rows: int) -> Plan:
    """The plan of the same settings with `rows` rows in a batch."""
    cfg = self.plan.cfg
    return make_plan(replace(cfg, train=replace(cfg.train, batch_size=rows)))

  @cached_property
  def solo(self) -> "StepRunner":
    """The step of the plan, which the parts share, so that it is compiled once."""
    return self.runner()

  def runner(self, plans: Sequence[Plan] | None = None) -> "StepRunner":
    """The compiled step of the trials `plans`, by default of one trial."""
    plans = plans or [self.plan]
    job = make_job(plans[0], self.base, STEPS, plans)
    batch = job.put(self.first_batch(plans[0]))
    return StepRunner(compile_step(job, batch), batch)


class StepRunner:
  """Trains on one batch repeatedly."""

  def __init__(self, step: CompiledStep, batch: Mapping[str, Any]):
    self.step, self.batch, self.state = step, batch, step.job.state
    self.loss: jax.Array | None = None

  def work(self, steps: int) -> None:
    """Trains `steps` times and waits for the last."""
    for _ in range(steps):
      self.state, metrics = self.step(self.state, self.batch)
      self.loss = metrics["loss"]
    jax.block_until_ready((self.state, self.loss))

  def losses(self) -> list[float]:
    """The last loss of each trial."""
    return np.asarray(self.loss, np.float64).tolist()


def make_subject(cfg: Config) -> Subject:
  """The subject of a config. A base that would be pretrained is random, which takes the same time in each step."""
  if cfg.model.base == "pretrain":
    cfg = replace(cfg, model=replace(cfg.model, base="random"))
  return Subject(make_plan(cfg))

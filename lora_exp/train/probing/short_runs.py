"""Short runs: trials of a few steps, trained as one pack without writing files."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from lora_exp import lora
from lora_exp.config import LoraConfig
from lora_exp.data.pipeline import eval_batches, train_batches
from lora_exp.data.rows import Rows
from lora_exp.lora import methods
from lora_exp.train.compiled_step import abstract_batch, compile_step
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.trial_padding import take_trial
from lora_exp.train.evaluating.evaluation import byte_lengths, held_out, put_eval_batches
from lora_exp.train.job import Job, make_job
from lora_exp.train.loop import NO_HOOKS, Cadence, train_loop
from lora_exp.train.plan import Plan


@dataclass(frozen=True)
class ShortRun:
  """The result of a short run."""

  plan: Plan
  gain: float  # how far it lowered the held-out loss; -inf if it diverged
  adapter: lora.Adapter


class ShortRunner:
  """Trains and evaluates short runs on one base and one data source."""

  def __init__(self, plan: Plan, base: Tree, rows: Rows, steps: int, eval_tokens: int):
    self.base, self.rows, self.steps, self.eval_tokens = base, rows, steps, eval_tokens
    untrained = make_job(plan, base, steps)
    self.base_loss = self._losses(untrained, untrained.state.params, [plan])[0]

  def train(self, plans: Sequence[Plan], title: str) -> list[ShortRun]:
    """Trains the trials `plans`, which differ in rates, ranks and targets, on the same batches.

    The learning rate follows its whole schedule, so that each is a complete run of few steps. Raises StoppedError on a
    signal, and DivergedError if every trial of a pack diverges.
    """
    if _share_a_pack(plans):
      return self._train_pack(plans, title)
    return [run for plan in plans for run in self._train_pack([plan], title)]

  def _train_pack(self, plans: Sequence[Plan], title: str) -> list[ShortRun]:
    cfg = plans[0].cfg
    job = make_job(plans[0], self.base, self.steps, plans)
    step = compile_step(job, abstract_batch(plans[0]))
    with closing(train_batches(self.rows, cfg.data, cfg.train.batch_size)) as batches:
      params = train_loop(step, batches, Cadence(0, 0, 0), NO_HOOKS, title).params
    gains = self.base_loss - self._losses(job, params, plans)
    runs = []
    for n, (plan, gain) in enumerate(zip(plans, gains, strict=True)):
      adapter = take_trial(params, plan.table, plan.full, job.program.method, n)
      adapter = adapter if plan.start is None else replace(adapter, base=plan.start.base)
      runs.append(ShortRun(plan, float(gain) if np.isfinite(gain) else -np.inf, adapter))
    return runs

  def truncated_gains(self, run: ShortRun, ranks: Sequence[int]) -> np.ndarray:
    """How far the update of `run` lowers the held-out loss if it is truncated to each of `ranks` by SVD, (ranks,)."""
    plan, plans = run.plan, []
    for rank in ranks:
      truncated, _ = lora.resize(run.adapter, rank)
      settings = replace(plan.cfg.lora, method=truncated.method, init=LoraConfig.init, options=None, budget=None)
      cfg = replace(plan.cfg, lora=replace(settings, rank=rank))
      plans.append(replace(plan, cfg=cfg, table=list(truncated.rows), start=truncated))
    job = make_job(plans[0], self.base, self.steps, plans)
    return self.base_loss - self._losses(job, job.state.params, plans)

  def _losses(self, job: Job, params: Tree, plans: Sequence[Plan]) -> np.ndarray:
    """The held-out loss of each trial (N,)."""
    cfg = plans[0].cfg
    batches = eval_batches(self.rows, cfg.train.batch_size, self.eval_tokens)
    placed = put_eval_batches(batches, job.put, byte_lengths(cfg.data, plans[0].tokenizer))
    evaluations = held_out(job.evaluate, params, job.trials, job.frozen, placed)
    return np.array([evaluation.metrics["loss"] for evaluation in evaluations][: len(plans)])


def _share_a_pack(plans: Sequence[Plan]) -> bool:
  """Whether trials of different ranks and targets can train as one program."""
  lora_cfg = plans[0].cfg.lora
  same_modules = len({tuple(row.path for row in plan.table) for plan in plans}) == 1
  same_ranks = len({plan.cfg.lora.rank for plan in plans}) == 1
  if not methods.of(lora_cfg).paddable and not same_ranks:
    return False
  return same_modules or (lora_cfg.quant is None and len({tuple(plan.full) for plan in plans}) == 1)

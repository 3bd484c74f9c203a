"""How much of `data@retain` an evaluation reads. With a large base and few steps it would take longer than training."""

from lora_exp.data.pipeline import eval_batches
from lora_exp.data.rows import Rows
from lora_exp.runtime import console
from lora_exp.train.evaluating.evaluation import EvalBatch, byte_lengths, put_eval_batches
from lora_exp.train.plan import Plan

LARGE = 50_000_000  # parameters of a base whose evaluations are limited
SHARE = 0.1  # of the work of training: the limit for all evaluations on retain together
PASSES = 3  # forward passes that cost about as much as a training step


def retain_limit(plan: Plan, steps: int) -> int | None:
  """The tokens of `data@retain` per evaluation of a run with `steps` steps; None: all.

  This is `train.retain_tokens`. For a large base it is less, if needed, so that all evaluations take at most a tenth of
  the work of training; it is at least one batch, in whole batches. It depends only on the settings, so that runs can be
  compared.
  """
  cfg = plan.cfg
  wanted = cfg.train.retain_tokens
  if cfg.retain is None or not steps or plan.parameters()["total"] < LARGE:
    return wanted
  every = cfg.train.eval_every
  evaluations = 2 + ((steps - 1) // every if every else 0)
  batch = cfg.train.batch_size * cfg.data.seq_len
  limit = max(1, int(SHARE * PASSES * steps / evaluations)) * batch
  return limit if wanted is None or wanted > limit else wanted


def show_limit(plan: Plan, limit: int | None) -> None:
  """Says that an evaluation reads less than `train.retain_tokens`."""
  wanted = plan.cfg.train.retain_tokens
  if limit != wanted:
    console.show(f"Forgetting is measured on {limit:,} tokens instead of {'all' if wanted is None else f'{wanted:,}'} "
                 f"(train.retain_tokens), so that it takes at most {SHARE:.0%} of the work of training, or one batch. "
                 "A longer run allows more; data@retain=none turns it off.")


def retained_batches(plan: Plan, rows: Rows | None, limit: int | None) -> list[EvalBatch]:
  """The held-out batches of `data@retain`, with about `limit` tokens, on the devices; [] without retain."""
  source = plan.cfg.retain
  if source is None or rows is None:
    return []
  batches = eval_batches(rows, plan.cfg.train.batch_size, limit)
  return list(put_eval_batches(batches, plan.layout.put_batch, byte_lengths(source, plan.tokenizer)))

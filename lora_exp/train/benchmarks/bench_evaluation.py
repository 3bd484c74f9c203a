"""The part `eval`: tokens per second of an evaluation, and its time as a multiple of a forward pass."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax

from lora_exp.config.schema.task_settings import BenchConfig
from lora_exp.data.pipeline import eval_batches
from lora_exp.train.benchmarks.bench_rows import Row
from lora_exp.train.benchmarks.bench_step import rates
from lora_exp.train.benchmarks.bench_subject import Subject
from lora_exp.train.benchmarks.turns import Side, ratios, take_turns
from lora_exp.train.compute.hyperparameters import Hyperparameters
from lora_exp.train.compute.program import Tree
from lora_exp.train.compute.step import Batch, batch_loss
from lora_exp.train.evaluating.evaluation import put_eval_batches
from lora_exp.train.evaluating.held_out_documents import held_out_documents

EVAL, FORWARD = "eval", "forward"  # sides
BATCHES = 4  # held-out batches, about


def measure_evaluation(subject: Subject, settings: BenchConfig) -> list[Row]:
  """The rows of the part. The forward pass ends in the loss, without a gradient and without sums by document."""
  job, train = subject.solo.step.job, replace(subject.plan.cfg.train, eval_tokens=BATCHES * subject.tokens)
  plan = replace(subject.plan, cfg=replace(subject.plan.cfg, train=train))
  batches = list(eval_batches(subject.rows, train.batch_size, train.eval_tokens))
  segments = held_out_documents(plan, subject.rows, batches, job.byte_lengths).segments
  arrays = [batch.arrays for batch in put_eval_batches(batches, job.put, job.byte_lengths)]

  @jax.jit
  def forward(params: Tree, trials: Hyperparameters, frozen: Tree, batch: Batch) -> jax.Array:
    first, trial = jax.tree.map(_first, (params, trials))
    return batch_loss(job.program, first, trial, frozen, batch, None).loss

  evaluate = partial(job.evaluate, segments=segments)
  sides = {EVAL: _over_batches(subject, evaluate, arrays), FORWARD: _over_batches(subject, forward, arrays)}
  times = take_turns(sides, settings.turns, settings.seconds)
  return [
    Row(EVAL, "tokens_per_s", "tokens/s", rates(subject.tokens, times[EVAL])),
    Row(EVAL, "times_forward", "times a forward pass", ratios(times[EVAL], times[FORWARD])),
  ]


def _first(x: jax.Array) -> jax.Array:
  """The first of the trials."""
  return x[0]


def _over_batches(subject: Subject, function: Callable[..., object], batches: list[Batch]) -> Side:
  """Calls `function` on one batch after another."""
  job = subject.solo.step.job

  def work(count: int) -> None:
    results = [
      function(subject.solo.state.params, job.trials, job.frozen, batches[i % len(batches)]) for i in range(count)
    ]
    jax.block_until_ready(results)

  return Side(work)

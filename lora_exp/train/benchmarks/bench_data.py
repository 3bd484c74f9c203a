"""The part `data`: rows per second of the data pipeline, and what it adds to a step."""

from collections.abc import Iterator

import jax

from lora_exp.config.schema.task_settings import BenchConfig
from lora_exp.data.encoding.records import Batch
from lora_exp.data.pipeline import train_batches
from lora_exp.train.benchmarks.bench_rows import Row
from lora_exp.train.benchmarks.bench_step import rates
from lora_exp.train.benchmarks.bench_subject import StepRunner, Subject
from lora_exp.train.benchmarks.turns import Side, ratios, take_turns

DATA, STEP, FED = "data", "step", "fed"  # sides


def measure_data(subject: Subject, settings: BenchConfig) -> list[Row]:
  """The rows of the part: the pipeline alone, a step on one batch, and steps that the pipeline feeds."""
  cfg = subject.plan.cfg
  batches = train_batches(subject.rows, cfg.data, cfg.train.batch_size)
  try:
    sides = {DATA: _pipeline(subject.solo, batches), STEP: Side(subject.solo.work), FED: _fed(subject.solo, batches)}
    times = take_turns(sides, settings.turns, settings.seconds)
  finally:
    batches.close()
  return [
    Row(DATA, "rows_per_s", "rows/s, without steps", rates(cfg.train.batch_size, times[DATA])),
    Row(DATA, "share_of_step", "a batch, as a share of a step", ratios(times[DATA], times[STEP])),
    Row(DATA, "times_step", "a step with / without the pipeline", ratios(times[FED], times[STEP])),
  ]  # fmt: skip


def _pipeline(runner: StepRunner, batches: Iterator[Batch]) -> Side:
  """Reads batches and puts them on the devices."""

  def work(count: int) -> None:
    for _ in range(count):
      jax.block_until_ready(runner.step.job.put(next(batches)))

  return Side(work)


def _fed(runner: StepRunner, batches: Iterator[Batch]) -> Side:
  """Trains on a new batch in each step. As in training, the next one is read while the device computes."""

  def work(steps: int) -> None:
    arrays = runner.step.job.put(next(batches))
    for _ in range(steps):
      runner.state, _ = runner.step(runner.state, arrays)
      arrays = runner.step.job.put(next(batches))
    jax.block_until_ready(runner.state)

  return Side(work)

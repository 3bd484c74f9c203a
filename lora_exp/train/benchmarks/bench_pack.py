"""The part `pack`: N trials as a pack, against the same trials one after another and one run at the summed batch."""

from lora_exp.config.schema.task_settings import BenchConfig
from lora_exp.train.benchmarks.bench_rows import Row
from lora_exp.train.benchmarks.bench_step import memory_rows, speed_rows
from lora_exp.train.benchmarks.bench_subject import StepRunner, Subject
from lora_exp.train.benchmarks.turns import Side, ratios, take_turns

PACK, ALONE, SUMMED = "pack", "alone", "summed"  # sides


def measure_pack(subject: Subject, settings: BenchConfig) -> list[Row]:
  """The rows of the part. Trials have the ranks `bench.ranks`, repeated."""
  ranks = _ranks(subject, settings)
  plans = {rank: subject.at_rank(rank) for rank in dict.fromkeys(ranks)}
  pack = subject.runner([plans[rank] for rank in ranks])
  alone = {rank: subject.solo if rank == subject.plan.cfg.lora.rank else subject.runner([plan])
           for rank, plan in plans.items()}
  summed = subject.runner([subject.at_batch_size(len(ranks) * subject.plan.cfg.train.batch_size)])
  sides = {PACK: Side(pack.work), ALONE: _one_after_another(alone, ranks), SUMMED: Side(summed.work)}
  times = take_turns(sides, settings.turns, settings.seconds)
  shown = ", ".join(map(str, dict.fromkeys(ranks)))
  return [
    Row(PACK, "trials", f"trials (rank {shown})", len(ranks)),
    *speed_rows(PACK, len(ranks) * subject.tokens, times[PACK]),
    Row(PACK, "times_one_after_another", "times as fast as one after another", ratios(times[ALONE], times[PACK])),
    Row(PACK, "of_summed_batch", "of one run at the summed batch", ratios(times[SUMMED], times[PACK])),
    *memory_rows(PACK, pack),
    Row(PACK, "compile_seconds", "compilation, s", pack.step.seconds),
    Row(PACK, "compile_seconds_alone", "compilation of the trials alone, s",
        sum(runner.step.seconds for runner in alone.values())),
  ]  # fmt: skip


def _ranks(subject: Subject, settings: BenchConfig) -> list[int]:
  """The rank of each trial."""
  ranks = settings.ranks or [subject.plan.cfg.lora.rank]
  return [ranks[i % len(ranks)] for i in range(settings.pack)]


def _one_after_another(runners: dict[int, StepRunner], ranks: list[int]) -> Side:
  """A step of each trial, in a program of its own; trials of one rank share it."""

  def work(steps: int) -> None:
    for rank, runner in runners.items():
      runner.work(steps * ranks.count(rank))

  return Side(work)

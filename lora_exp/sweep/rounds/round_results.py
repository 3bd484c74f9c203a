"""Reads the results of a run that decide how a sweep in rounds continues."""

import math
from collections.abc import Sequence

from lora_exp.config.metrics import Metric
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.round_plan import Results, RoundResult, RoundTrial


def read_results(runs: LaunchedRuns, trials: Sequence[RoundTrial], metric: Metric) -> Results:
  """The results of `trials` from the files of their runs."""
  return {trial.number: round_result(runs.read(trial.number), metric) for trial in trials}


def round_result(run: RunRecord, metric: Metric) -> RoundResult:
  """The results of a run that decisions use."""
  if run.status == "diverged":
    return RoundResult(math.inf, math.nan, run.trainable, run.last_step)
  if run.status == "pruned":
    return RoundResult(trainable=run.trainable, steps=run.last_step, dropped=True)
  tuning, base, result = run.tuning_result(metric.name), run.base(metric.name), run.result(metric.name)
  return RoundResult(
    None if tuning is None else metric.sign * tuning,
    None if base is None or result is None else metric.sign * (base - result),
    run.trainable, run.last_step, run.documents.get(metric.name), run.result("loss"),
  )  # fmt: skip

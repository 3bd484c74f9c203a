"""Runs of a sweep with their plans. Each plan is made once, here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import InputError
from lora_exp.sweep.sweep_run import SweepRun
from lora_exp.train.costs.memory import require_memory
from lora_exp.train.plan import Plan, make_plan


@dataclass(frozen=True)
class PlannedRun:
  """A run of a sweep and its plan."""

  number: int
  plan: Plan
  run_dir: Path


def plan_runs(jobs: Sequence[SweepRun]) -> tuple[list[PlannedRun], dict[int, InputError]]:
  """The jobs with their plans, and the errors of jobs that are invalid or too large, by number."""
  runs, problems = [], {}
  for job in jobs:
    try:
      plan = make_plan(job.cfg)
      require_memory(plan)
      runs.append(PlannedRun(job.number, plan, job.run_dir))
    except InputError as error:
      problems[job.number] = error
  return runs, problems

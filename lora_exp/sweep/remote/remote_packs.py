"""Training of a sweep whose packs are jobs of a Hydra plugin, in other processes or on other machines."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.hydra_config import HydraConfig

from lora_exp.runtime import console
from lora_exp.sweep.ledger import Outcome
from lora_exp.sweep.packs.packed_sweep import plan_sweep, sweep_outcomes, train_packed
from lora_exp.sweep.packs.packing import group_runs, show_packs
from lora_exp.sweep.packs.planned_run import plan_runs
from lora_exp.sweep.remote.remote_jobs import launch
from lora_exp.sweep.sweep_run import PackedSweep, SweepRun

PACKS = "packs"  # subdirectory of the sweep for the logs of the packs
CHOOSES_SWEEPER = ("sweep=", "experiment=")  # overrides that select a sweeper, without which its settings do not exist


@dataclass(frozen=True)
class PackTask:
  """Hydra's task function for a job that is a pack. Trains the pack with the number of the job."""

  packs: list[list[SweepRun]]
  sweep: PackedSweep

  def __setstate__(self, state: dict[str, Any]) -> None:
    """Unpickles the task in another process, which shares the terminal with others."""
    self.__dict__.update(state)
    console.share()

  def __call__(self, _: Any) -> list[Outcome]:
    """Trains the pack and returns how its runs ended."""
    try:
      jobs = self.packs[HydraConfig.get().job.num]
      stopped = train_packed(plan_sweep(jobs, self.sweep), self.sweep)
      return sweep_outcomes(jobs, self.sweep, stopped)
    except Exception:
      logging.getLogger("lora_exp").exception("the pack ended")
      raise


def run_remote_packs(
  jobs: Sequence[SweepRun], sweep: PackedSweep, make_launcher: Callable[[PackTask], Any]
) -> list[Outcome]:
  """Trains each pack with the launcher that `make_launcher` creates for a task. Returns how each job ended.

  Plans are made here to group the jobs, and again in the process that trains a pack, which may have other devices.
  """
  by_number = {job.number: job for job in jobs}
  runs, _ = plan_runs(jobs)
  groups = group_runs(runs, sweep.width)
  show_packs(groups)
  packs = [[by_number.pop(number) for number in group.numbers] for group in groups]
  packs += [[job] for job in by_number.values()]  # jobs without a plan fail, and are recorded, in their process
  chosen = [text for text in jobs[0].overrides.split() if text.startswith(CHOOSES_SWEEPER)]
  overrides = [[*chosen, f"hydra.sweep.subdir={PACKS}/{n}", "hydra.output_subdir=null"] for n in range(len(packs))]
  expected = [[Outcome(job.number, overrides=job.overrides) for job in pack] for pack in packs]
  outcomes = launch(make_launcher(PackTask(packs, sweep)), overrides, 0, expected, sweep.directory)
  return sorted(outcomes, key=lambda outcome: outcome.number)

"""A sweep in packs, trained here one after another, or each as one job that another launcher places."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from lora_exp.config import Config, StoppedError
from lora_exp.runtime import console
from lora_exp.sweep import packed_training, placed_launcher
from lora_exp.sweep.ledger import Ledger, Outcome
from lora_exp.sweep.packing import groups

DIRECTORY = "packs"  # in the sweep's: a log of each pack that was placed


@dataclass
class Packs:
  """The jobs of a sweep in `directory`, (number, config, directory) each; `runs` have their numbers, in the order."""

  jobs: Sequence[tuple[int, Config, Path]]
  runs: Sequence[Outcome]
  width: int | None
  directory: Path
  repeat_failed: bool
  stopped: StoppedError | None = None  # by a signal

  def train(self) -> list[Outcome]:
    """Trains all jobs in this process; returns how each ended."""
    jobs = [packed_training.Job(*job) for job in self.jobs]
    try:
      packed_training.train(jobs, self.width, Ledger(self.directory), self.repeat_failed)
    except StoppedError as error:
      self.stopped = error
    ledger = Ledger(self.directory)
    return [_ended(job, run, ledger, self.stopped) for job, run in zip(jobs, self.runs, strict=True)]

  def train_placed(self, placing: Callable[[Any], Any]) -> list[Outcome]:
    """Has each pack trained where the launcher puts it that `placing` makes for a task; returns how each job ended."""
    cfgs = [cfg for _, cfg, _ in self.jobs]
    packs = groups(cfgs, self.width)
    packed_training.show_packs([packed_training.Job(*job) for job in self.jobs], packs)
    parts = [replace(self, jobs=[self.jobs[n] for n in pack], runs=[self.runs[n] for n in pack]) for pack in packs]
    asked = [[f"hydra.sweep.subdir={DIRECTORY}/{n}", "hydra.output_subdir=null"] for n in range(len(packs))]
    found = placed_launcher.launch(placing(PackTask(parts)), asked, 0, [part.runs for part in parts], self.directory)
    return sorted(found, key=lambda outcome: outcome.number)


@dataclass
class PackTask:
  """Hydra's task function where a job is a pack: trains the one that the job's number names, wherever it is called."""

  packs: list[Packs]

  def __setstate__(self, state: dict[str, Any]) -> None:
    """A copy in another process, which may share the terminal with others."""
    self.__dict__.update(state)
    console.share()

  def __call__(self, _: Any) -> list[Outcome]:
    try:
      return self.packs[HydraConfig.get().job.num].train()
    except Exception:
      logging.getLogger("lora_exp").exception("the pack ended")
      raise


def _ended(job: packed_training.Job, run: Outcome, ledger: Ledger, stopped: StoppedError | None) -> Outcome:
  if job.error is not None:
    return replace(run, code=job.error.code, reason=str(job.error))
  if stopped is not None and not ledger.ended(job.number):
    return replace(run, code=stopped.code, reason=str(stopped))
  return run

"""A sweep whose runs train in packs, in this process: plan every run, group the plans, train one pack after another."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import LoraExpError, MemoryFullError, ReachedError, StoppedError
from lora_exp.config.errors import STOPPED
from lora_exp.runtime import console
from lora_exp.runtime.locks import run_lock
from lora_exp.runtime.mesh import keep_programs
from lora_exp.runtime.run_files import SAMPLES
from lora_exp.runtime.saved_config import require_same_configs, save_config
from lora_exp.sweep.ledger import Ledger, Outcome
from lora_exp.sweep.packing import SweepPack, make_packs, show_packs
from lora_exp.sweep.planned_run import PlannedRun, plan_runs
from lora_exp.sweep.sweep_run import SweepRun
from lora_exp.train.memory import memory_errors
from lora_exp.train.pack import make_pack, restore_pack
from lora_exp.train.pack_training import train_pack
from lora_exp.train.run_summary import short
from lora_exp.train.trial import Trial, common_steps
from lora_exp.train.trial_writer import TrialResult
from lora_exp.train.trials import union

log = logging.getLogger("lora_exp")


@dataclass(frozen=True)
class SweepResult:
  """How the runs of a sweep ended, and the signal that stopped it, if one did."""

  outcomes: list[Outcome]
  stopped: StoppedError | None = None


def train_packed(jobs: Sequence[SweepRun], width: int | None, directory: Path, repeat_failed: bool) -> SweepResult:
  """Trains every job of the sweep in `directory` that has not ended.

  A sweep that was begun continues: its packs are made again, runs that have ended keep their place in them as inactive
  trials, and the others resume from their checkpoints. With `repeat_failed`, failed runs then train once more, in packs
  of their own. Raises InputError if a job was begun with other settings.
  """
  keep_programs(jobs[0].cfg.cache)
  require_same_configs((job.number, job.cfg, job.run_dir) for job in jobs)
  ledger, stopped = Ledger(directory), None
  failed = [job.number for job in jobs if repeat_failed and ledger.state(job.number) == "failed"]
  runs, problems = plan_runs(jobs)
  for number, error in problems.items():
    _fail(number, error, ledger)
  try:
    _train_packs(make_packs(runs, width, ledger), ledger)
    if repeated := [run for run in runs if run.number in failed]:
      for run in repeated:
        ledger.add("repeated", trial=run.number)
      _train_packs(make_packs(repeated, width, ledger), ledger)
  except StoppedError as error:
    stopped = error
  return SweepResult([_outcome(job, ledger, stopped) for job in jobs], stopped)


def _outcome(job: SweepRun, ledger: Ledger, stopped: StoppedError | None) -> Outcome:
  """How a job ended; one that did not was stopped, by a signal or at train.stop_at."""
  if ended := ledger.outcome(job.number, job.overrides):
    return ended
  reason = f"stopped at train.stop_at={job.cfg.train.stop_at}" if stopped is None else str(stopped)
  return Outcome(job.number, STOPPED, reason, job.overrides)


def _train_packs(packs: Sequence[SweepPack], ledger: Ledger) -> None:
  """Trains the packs in turn. Raises StoppedError on a signal."""
  show_packs(packs)
  for number, pack in enumerate(packs):
    remaining = sum(not ledger.ended(run.number) for run in pack)
    if remaining == 0:
      console.show(f"pack {number} of {len(packs)}: ended before")
      continue
    ended = f", {len(pack) - remaining} of them ended" if remaining < len(pack) else ""
    console.show(f"\npack {number} of {len(packs)}: {len(pack)} trial{'s' if len(pack) > 1 else ''}{ended}")
    _train_or_split(pack, number, ledger)


def _train_or_split(pack: SweepPack, number: int, ledger: Ledger) -> None:
  """Trains a pack; if it does not fit in memory, its halves one after the other, each from its last checkpoints."""
  ledger.add("pack", pack=number, trials=[run.number for run in pack])
  try:
    _train_together(_without_pruned(pack, ledger), ledger)
    return
  except MemoryFullError as error:
    reason = str(error)  # the error holds the frames, and they the arrays: both are freed before the halves train
  remaining = [run for run in pack if not ledger.ended(run.number)]
  half = (len(remaining) + 1) // 2
  parts = [part for part in (remaining[:half], remaining[half:]) if part]
  sizes = " and ".join(str(len(part)) for part in parts)
  console.show_warning(
    f"pack {number}: {len(pack)} trials do not fit in memory; they go on as packs of {sizes}: {reason}"
  )
  ledger.add("split", pack=number, trials=[run.number for run in remaining], reason=reason)
  for part in parts:
    _train_or_split(part, number, ledger)


def _train_together(pack: SweepPack, ledger: Ledger) -> None:
  """Trains a pack as one program, and writes to the ledger how each run ended.

  Raises StoppedError on a signal, and MemoryFullError if several runs do not fit in memory together.
  """
  started = time.monotonic()
  trials = [Trial(n, run.plan, run.run_dir, not ledger.ended(run.number)) for n, run in enumerate(pack)]
  with ExitStack() as stack:
    for run in pack:
      run.run_dir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(run_lock(run.run_dir))
      save_config(run.plan.saved_cfg, run.run_dir)
    try:
      with memory_errors(pack[0].plan, len(pack)):
        built, resumed = make_pack(trials, started, solo=False), bool(common_steps(trials))
        _begin(pack, resumed, ledger)
        results = train_pack(restore_pack(built) if resumed else built)
    except StoppedError as error:
      again = f"go on with the same command and hydra.sweep.dir={short(pack[0].run_dir.parent)}"
      raise StoppedError(f"{error}; {again}") from None
    except LoraExpError as error:
      if isinstance(error, MemoryFullError) and len(pack) > 1:
        raise
      for run in pack:
        _fail(run.number, error, ledger)
      return
  for run, result in zip(pack, results, strict=True):
    _end(run, result, ledger)


def _begin(pack: SweepPack, resumed: bool, ledger: Ledger) -> None:
  for run in pack:
    if not ledger.ended(run.number):
      ledger.add("started", trial=run.number, resumed=resumed)
      if not resumed:
        (run.run_dir / SAMPLES).unlink(missing_ok=True)


def _end(run: PlannedRun, result: TrialResult, ledger: Ledger) -> None:
  if isinstance(result.error, ReachedError):
    ledger.add("stopped", trial=run.number, step=run.plan.cfg.train.stop_at)
  elif result.error is not None:
    _fail(run.number, result.error, ledger)
  elif result.status == "done" and result.summary is not None:
    ledger.add("done", trial=run.number)
    losses = result.summary["losses"]
    loss = losses["best"] or losses["final"]
    console.show(f"run {run.number}: {result.summary['name']}  held-out loss {loss:.4f}")


def _fail(number: int, error: LoraExpError, ledger: Ledger) -> None:
  if not ledger.ended(number):
    log.error("run %d: %s", number, error)
    ledger.add("failed", trial=number, code=error.code, reason=str(error))
    console.show_error(LoraExpError(f"run {number}: {error}"))


def _without_pruned(pack: SweepPack, ledger: Ledger) -> SweepPack:
  """`pack` without the runs that a study pruned, except those that decide the pack's shapes.

  So the arrays of the others, and with them their losses, are what they are in the whole pack.
  """
  remaining = pack
  for run in pack:
    others = [other for other in remaining if other is not run]
    if ledger.state(run.number) == "pruned" and len(others) > 1 and _ranks(others) == _ranks(pack):
      remaining = others
  return remaining


def _ranks(pack: SweepPack) -> dict[str, int]:
  return {row.path: row.rank for row in union([run.plan.table for run in pack])}

"""Training of a sweep in packs in this process: plans every run, groups the plans, and trains pack after pack."""

import time
from collections.abc import Sequence
from contextlib import ExitStack

from lora_exp.config import LoraExpError, MemoryFullError, ReachedError, StoppedError
from lora_exp.config.errors import STOPPED
from lora_exp.runtime import console
from lora_exp.runtime.console_text import time_left
from lora_exp.runtime.display_paths import typed_path
from lora_exp.runtime.locks import run_lock
from lora_exp.runtime.program_cache import keep_programs
from lora_exp.runtime.run_files import SAMPLES
from lora_exp.runtime.saved_config import require_same_configs, save_config
from lora_exp.sweep.ledger import Ledger, Outcome
from lora_exp.sweep.packs.packing import SweepPack, make_packs, show_packs, without_pruned
from lora_exp.sweep.packs.planned_run import PlannedRun, plan_runs
from lora_exp.sweep.sweep_run import PackedSweep, SweepRun
from lora_exp.train.costs.memory import memory_errors
from lora_exp.train.moved_sources import require_equal_content
from lora_exp.train.pack import make_pack, restore_pack
from lora_exp.train.pack_data import make_pack_data
from lora_exp.train.pack_training import train_pack
from lora_exp.train.stop_signals import StopRequest, stop_signals
from lora_exp.train.trial import Trial, common_steps
from lora_exp.train.trial_writer import TrialResult


def plan_sweep(jobs: Sequence[SweepRun], sweep: PackedSweep) -> list[PlannedRun]:
  """Makes the plan of every job. Jobs with an invalid config are recorded as failed and left out.

  Raises InputError if a run directory belongs to a run with other settings.
  """
  runs, problems = plan_runs(jobs)
  require_equal_content(require_same_configs((job.number, job.cfg, job.run_dir) for job in jobs))
  ledger = Ledger(sweep.directory)
  for number, error in problems.items():
    ledger.fail(number, error)
  return runs


def train_packed(runs: Sequence[PlannedRun], sweep: PackedSweep) -> StoppedError | None:
  """Trains every run that has not ended, in packs. Returns the error if a signal stopped the sweep, else None.

  To continue a sweep, its packs are rebuilt: runs that have ended are inactive trials, and the others resume from their
  checkpoints. A run that is done but whose summary was deleted is trained again. With `repeat_failed`, failed runs are
  then trained again in separate packs. How each run ended is recorded in the ledger.
  """
  ledger = Ledger(sweep.directory)
  for run in runs:
    ledger.reopen(run.number, run.run_dir)
  repeated = [run for run in runs if sweep.repeat_failed and ledger.state(run.number) == "failed"]
  try:
    _train_packs(make_packs(runs, sweep.width, ledger), ledger)
    for run in repeated:
      ledger.add("repeated", trial=run.number)
    _train_packs(make_packs(repeated, sweep.width, ledger), ledger)
  except StoppedError as error:
    return error
  return None


def sweep_outcomes(jobs: Sequence[SweepRun], sweep: PackedSweep, stopped: StoppedError | None) -> list[Outcome]:
  """How each job ended. A job that has not ended was stopped by a signal or at train.stop_at."""
  ledger, outcomes = Ledger(sweep.directory), []
  for job in jobs:
    reason = f"stopped at train.stop_at={job.cfg.train.stop_at}" if stopped is None else str(stopped)
    ended = ledger.outcome(job.number, job.overrides)
    outcomes.append(ended or Outcome(job.number, STOPPED, reason, job.overrides))
  return outcomes


def _train_packs(packs: Sequence[SweepPack], ledger: Ledger) -> None:
  """Trains packs one after another and skips those that have ended. Raises StoppedError on a signal."""
  with stop_signals() as stop:
    _train_until(stop, packs, ledger)


def _train_until(stop: StopRequest, packs: Sequence[SweepPack], ledger: Ledger) -> None:
  """`_train_packs` until `stop` is requested."""
  if packs:
    keep_programs(packs[0].runs[0].plan.cfg.cache)
    show_packs(packs)
  began, all_trials, trained = time.monotonic(), sum(_remaining(pack, ledger) for pack in packs), 0
  for number, pack in enumerate(packs):
    if stop.requested:
      raise StoppedError(f"stopped after pack {number - 1}; continue with the same command and "
                         f"{typed_path('hydra.sweep.dir', pack.runs[0].run_dir.parent)}")
    count, remaining = len(pack.runs), _remaining(pack, ledger)
    if remaining == 0:
      console.show(f"pack {number} of {len(packs)}: already done")
      continue
    ended = f", {count - remaining} of them already ended" if remaining < count else ""
    left = time_left(time.monotonic() - began, trained, all_trials)
    console.show(f"\npack {number} of {len(packs)}: {count} trial{'s' if count > 1 else ''}{ended}{left}")
    _train_or_split(pack.runs, number, ledger)
    trained += remaining


def _remaining(pack: SweepPack, ledger: Ledger) -> int:
  """The number of trials of a pack that have not ended."""
  return sum(not ledger.ended(run) for run in pack.numbers)


def _train_or_split(runs: list[PlannedRun], pack: int, ledger: Ledger) -> None:
  """Trains a pack. If it does not fit in memory, trains its halves one after the other from their checkpoints."""
  numbers = [run.number for run in runs]
  ledger.add("pack", pack=pack, trials=numbers)
  try:
    _train_together(without_pruned(runs, ledger), ledger)
    return
  except MemoryFullError as error:
    reason = str(error)  # leaving this block frees the error, whose traceback references the arrays
  remaining = [run for run in runs if not ledger.ended(run.number)]
  half = (len(remaining) + 1) // 2
  parts = [part for part in (remaining[:half], remaining[half:]) if part]
  sizes = " and ".join(str(len(part)) for part in parts)
  console.show_warning(
    f"pack {pack}: {len(runs)} trials do not fit in memory; splitting it into packs of {sizes}: {reason}"
  )
  ledger.add("split", pack=pack, trials=[run.number for run in remaining], reason=reason)
  for part in parts:
    _train_or_split(part, pack, ledger)


def _train_together(runs: list[PlannedRun], ledger: Ledger) -> None:
  """Trains runs as one program and records in the ledger how each ended.

  Raises StoppedError on a signal, and MemoryFullError if several runs do not fit in memory together.
  """
  started, numbers = time.monotonic(), [run.number for run in runs]
  trials = [Trial(n, run.plan, run.run_dir, not ledger.ended(run.number)) for n, run in enumerate(runs)]
  with ExitStack() as stack:
    for run in runs:
      run.run_dir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(run_lock(run.run_dir))
      save_config(run.plan.saved_cfg, run.run_dir)
    try:
      with memory_errors(trials[0].plan, len(trials)):
        data = make_pack_data(trials[0].plan)
        pack, resumed = make_pack(trials, data, started, solo=False), bool(common_steps(trials))
        _record_starts(trials, numbers, resumed, ledger)
        results = train_pack(restore_pack(pack) if resumed else pack)
    except StoppedError as error:
      again = f"continue with the same command and {typed_path('hydra.sweep.dir', trials[0].run_dir.parent)}"
      raise StoppedError(f"{error}; {again}") from None
    except LoraExpError as error:
      if isinstance(error, MemoryFullError) and len(trials) > 1:
        raise
      for number in numbers:
        ledger.fail(number, error)
      return
  for number, result in zip(numbers, results, strict=True):
    _record_end(number, result, ledger)


def _record_starts(trials: Sequence[Trial], numbers: Sequence[int], resumed: bool, ledger: Ledger) -> None:
  """Records the start of the active trials, and deletes old samples unless they are resumed."""
  for number, trial in zip(numbers, trials, strict=True):
    if trial.active:
      ledger.add("started", trial=number, resumed=resumed)
      if not resumed:
        (trial.run_dir / SAMPLES).unlink(missing_ok=True)


def _record_end(number: int, result: TrialResult, ledger: Ledger) -> None:
  """Records how a trial ended, and shows its loss if it is done."""
  if isinstance(result.error, ReachedError):
    ledger.add("stopped", trial=number, step=result.trial.plan.cfg.train.stop_at)
  elif result.error is not None:
    ledger.fail(number, result.error)
  elif result.status == "done" and result.summary is not None:
    ledger.add("done", trial=number)
    losses = result.summary["losses"]
    loss = losses["best"] or losses["final"]
    seed = result.trial.plan.saved_cfg.seed
    console.show(f"run {number}: {result.summary['name']}, seed {seed}  held-out loss {loss:.4f}")

"""Training of a single run, which is a pack of one trial."""

import os
import time
from dataclasses import replace
from pathlib import Path

from lora_exp.config import DivergedError, NotStartedError, RewindError, StoppedError
from lora_exp.runtime import console
from lora_exp.runtime.display_paths import typed_path
from lora_exp.runtime.process_group import lost_processes
from lora_exp.runtime.run_files import CHECKPOINTS, SAMPLES
from lora_exp.train import expectations
from lora_exp.train.costs.memory import memory_errors, require_memory
from lora_exp.train.costs.plan_tables import show_config, show_parameters
from lora_exp.train.pack import Pack, make_pack, restore_pack
from lora_exp.train.pack_data import PackData, make_pack_data
from lora_exp.train.pack_training import train_pack
from lora_exp.train.plan import Plan
from lora_exp.train.records import checkpoint
from lora_exp.train.records.training_record import TrainingRecord
from lora_exp.train.run_summary import read_summary, show_result, write_summary
from lora_exp.train.trial import Trial
from lora_exp.train.trial_writer import TrialResult

MOST_REWINDS = 10  # of one run


def train_run(plan: Plan, run_dir: Path) -> None:
  """Trains the adapter of `plan` and writes `run_dir`, or resumes that run if `train.resume` is set."""
  started = time.monotonic()
  require_memory(plan)
  with memory_errors(plan):
    try:
      with lost_processes():
        data = make_pack_data(plan)  # first, so that an error in the data is not preceded by tables
        show_config(plan.saved_cfg, run_dir)
        show_parameters(plan)
        pack, result = _train(plan, data, run_dir, started)
      if result.error is not None:
        raise result.error
    except NotStartedError:
      raise
    except StoppedError as error:
      again = typed_path("train.resume", shared_directory(run_dir))
      raise type(error)(f"{error}; resume with {again}") from error.__cause__  # the log has the cause
    if result.params is not None:
      _show_result(pack, result)


def _train(plan: Plan, data: PackData, run_dir: Path, started: float) -> tuple[Pack, TrialResult]:
  """Trains the run of `plan`. With train.on_nan=rewind, a step that is not finite goes back to the last checkpoint.

  Raises DivergedError after MOST_REWINDS such steps.
  """
  resumes, passed = plan.cfg.train.resume is not None, None
  if resumes and _never_saved(run_dir):
    console.show("The run has no checkpoint yet: it starts again at step 0.")
    (run_dir / SAMPLES).unlink(missing_ok=True)
    resumes = False
  for rewinds in range(MOST_REWINDS + 1):
    pack = make_pack([Trial(0, plan, run_dir)], data, started, solo=True)
    if resumes:
      pack = restore_pack(pack)
    if passed is not None:
      pack = _passing(pack, *passed)
    try:
      [result] = train_pack(pack)
      return pack, result
    except RewindError as error:
      if rewinds == MOST_REWINDS:
        raise DivergedError(f"{error}; the run already went back to a checkpoint {MOST_REWINDS} times") from None
      resumes, passed = bool(checkpoint.steps(run_dir)), (error.step, pack.records[0])
      console.show_warning(f"{error}; going back to the last checkpoint, and leaving out this batch")
  raise AssertionError("the last attempt returns or raises")


def _never_saved(run_dir: Path) -> bool:
  """Whether a run ended before its first checkpoint. A finished or stopped run had one, which is then missing."""
  status = read_summary(shared_directory(run_dir)).get("status")
  return checkpoint.never_saved(run_dir) and status not in ("done", "stopped")


def _passing(pack: Pack, bad_step: int, before: TrainingRecord) -> Pack:
  """`pack`, set to continue after the batch of `bad_step`, which was trained from the record `before`."""
  start = int(pack.job.state.step)
  steps = bad_step - start
  record = replace(pack.records[0], passed_batches=before.passed_batches + steps, skipped=before.skipped + steps)
  return replace(pack, records=(record,))


def shared_directory(run_dir: Path) -> Path:
  """The directory of the run. A process that does not write it has a directory with a link to its checkpoints."""
  checkpoints = run_dir / CHECKPOINTS
  return Path(os.readlink(checkpoints)).parent if checkpoints.is_symlink() else run_dir


def _show_result(pack: Pack, result: TrialResult) -> None:
  """Shows the closing table and checks the expectations. Raises LoraExpError if one does not hold."""
  cfg, run_dir, summary = pack.plan.cfg, result.trial.run_dir, dict(result.summary or {})
  prompts = (prompt.strip() for prompt in cfg.sample.prompts if '"' not in prompt)
  show_result(summary, run_dir, cfg.data, next(prompts, "Once upon a time"))
  if cfg.expectations:
    trials = result.trial.select(pack.job.trials)
    batch = pack.held_out[0].arrays
    run = expectations.FinishedRun(pack.job, trials, result.params, summary, run_dir, batch)
    summary["expectations"] = expectations.check(cfg.expectations, run)
    write_summary(run_dir, summary)
    expectations.show(summary["expectations"])

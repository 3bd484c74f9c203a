"""Jobs of a sweep in packs: each group of them that can share a program is trained as one."""

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import Config, InputError, LoraExpError, MemoryFullError, ReachedError, StoppedError
from lora_exp.runtime import console
from lora_exp.runtime.locks import run_lock
from lora_exp.runtime.mesh import keep_programs
from lora_exp.runtime.saved_config import require_same_configs, save_config
from lora_exp.sweep.ledger import Ledger
from lora_exp.sweep.packing import groups, needed
from lora_exp.train import checkpoint
from lora_exp.train.memory import device_memory, memory_errors, nbytes
from lora_exp.train.outputs import short
from lora_exp.train.pack import Pack
from lora_exp.train.plan import Plan, make_plan
from lora_exp.train.trials import union

log = logging.getLogger("lora_exp")


@dataclass
class Job:
  """One point of a sweep and where it is trained."""

  number: int
  cfg: Config
  dir: Path
  error: LoraExpError | None = None


def train(jobs: Sequence[Job], width: int | None, ledger: Ledger, repeat_failed: bool = False) -> None:
  """Trains every job that has not ended; what ended one of them is its `error`. Raises StoppedError on a signal.

  A sweep that was begun goes on: the same packs are made again, trials that have ended go along in them as inactive, and
  the others go on from their checkpoints. With `repeat_failed`, those that had failed then train once more, in packs
  of their own. Raises InputError if a job was begun with other settings.
  """
  keep_programs(jobs[0].cfg.cache)
  for job in jobs:
    with suppress(InputError):  # told when its pack is built
      job.cfg = make_plan(job.cfg).saved_cfg
  require_same_configs((job.number, job.cfg, job.dir) for job in jobs)
  failed = [job for job in jobs if ledger.state(job.number) == "failed"]
  for job in failed:
    job.error = LoraExpError(str(ledger.reason(job.number)))
  _train_packs(jobs, width, ledger)
  if failed and repeat_failed:
    for job in failed:
      job.error = None
      ledger.add("repeated", trial=job.number)
    _train_packs(failed, width, ledger)


def _train_packs(jobs: Sequence[Job], width: int | None, ledger: Ledger) -> None:
  packs = packs_of(jobs, width, ledger)
  show_packs(jobs, packs)
  for number, members in enumerate(packs):
    pack = [jobs[n] for n in members]
    if all(ledger.ended(job.number) for job in pack):
      console.show(f"pack {number} of {len(packs)}: ended before")
      continue
    left = sum(not ledger.ended(job.number) for job in pack)
    ended = f", {len(pack) - left} of them ended" if left < len(pack) else ""
    console.show(f"\npack {number} of {len(packs)}: {len(pack)} trial{'s' if len(pack) > 1 else ''}{ended}")
    _train_pack(pack, number, ledger)


def packs_of(jobs: Sequence[Job], width: int | None, ledger: Ledger) -> list[list[int]]:
  """Places in `jobs` of each pack's trials: packs of a sweep that was begun as they were, others as wide as fits.

  Raises InputError for a width that is no number of trials.
  """
  if width is not None and (not isinstance(width, int) or width < 1):
    raise InputError(f"hydra.launcher.width={width}: is no number of trials; give one from 1 on, or null for what fits")
  place = {job.number: n for n, job in enumerate(jobs)}
  begun = [[place[trial] for trial in trials if trial in place] for trials in ledger.packs()]
  rest = [n for n in range(len(jobs)) if not any(n in pack for pack in begun)]
  anew = groups([jobs[n].cfg for n in rest], width)
  return [pack for pack in begun if pack] + [[rest[n] for n in pack] for pack in anew]


def _train_pack(pack: list[Job], number: int, ledger: Ledger) -> None:
  """Trains a pack; where it does not fit in memory, its halves one after the other, each from its last checkpoints."""
  ledger.add("pack", pack=number, trials=[job.number for job in pack])
  if (full := _try_pack(pack, ledger)) is None:
    return
  left = [job for job in pack if not ledger.ended(job.number)]
  half = (len(left) + 1) // 2
  parts = [part for part in (left[:half], left[half:]) if part]
  sizes = " and ".join(str(len(part)) for part in parts)
  console.show_warning(f"pack {number}: {len(pack)} trials do not fit in memory; they go on as packs of {sizes}: {full}")
  ledger.add("split", pack=number, trials=[job.number for job in left], reason=str(full))
  for part in parts:
    _train_pack(part, number, ledger)


def _try_pack(pack: list[Job], ledger: Ledger) -> MemoryFullError | None:
  """Trains a pack of several, or of one; what is returned says that several do not fit in memory together."""
  began = time.monotonic()
  built: list[tuple[Job, Plan]] = []
  for job in pack:
    try:
      built.append((job, make_plan(job.cfg)))
    except InputError as error:
      _failed(job, error, ledger)
  built = _without_pruned(built, ledger)
  if all(ledger.ended(job.number) for job, _ in built):
    return None
  with ExitStack() as stack:
    for job, _ in built:
      job.dir.mkdir(parents=True, exist_ok=True)
      stack.enter_context(run_lock(job.dir))
      save_config(job.cfg, job.dir)
    try:
      with memory_errors(built[0][1], len(built)):
        trials, resumed = _begun(built, began, ledger)
        trials.train(resumed)
    except ReachedError:
      for trial, (job, _) in zip(trials.trials, built, strict=True):
        if isinstance(trial.error, ReachedError):
          job.error = trial.error
          ledger.add("stopped", trial=job.number, step=job.cfg.train.stop_at)
        elif trial.error is not None:
          _failed(job, trial.error, ledger)
      return None
    except StoppedError as error:
      again = f"go on with the same command and hydra.sweep.dir={short(pack[0].dir.parent)}"
      raise StoppedError(f"{error}; {again}") from None
    except LoraExpError as error:
      if isinstance(error, MemoryFullError) and len(built) > 1:
        return MemoryFullError(str(error))  # the error itself holds the frames, and they the arrays
      for job, _ in built:
        _failed(job, error, ledger)
      return None
  for trial, (job, _) in zip(trials.trials, built, strict=True):
    if trial.error is not None:
      _failed(job, trial.error, ledger)
    elif not trial.inactive:
      ledger.add("done", trial=job.number)
      losses = trial.summary["losses"]
      console.show(f"run {job.number}: {trial.summary['name']}  held-out loss {losses['best'] or losses['final']:.4f}")
  return None


def _begun(built: Sequence[tuple[Job, Plan]], began: float, ledger: Ledger) -> tuple[Pack, bool]:
  """The pack, and whether it goes on from checkpoints that its live trials share; the ledger is told."""
  trials = Pack([plan for _, plan in built], [job.dir for job, _ in built], began, alone=False)
  for trial, (job, _) in zip(trials.trials, built, strict=True):
    trial.inactive = ledger.ended(job.number)
  resumed = bool(set.intersection(*(set(checkpoint.steps(trial.dir)) for trial in trials.live)))
  for job, _ in built:
    if not ledger.ended(job.number):
      ledger.add("started", trial=job.number, resumed=resumed)
      if not resumed:
        (job.dir / "samples.jsonl").unlink(missing_ok=True)
  return trials, resumed


def _without_pruned(built: list[tuple[Job, Plan]], ledger: Ledger) -> list[tuple[Job, Plan]]:
  """`built` without the trials that a study pruned, but for those that the pack owes its shapes to.

  So the arrays of the others, and with them their losses, are what they are in the whole pack.
  """
  shapes = lambda pairs: {row.path: row.rank for row in union([plan.table for _, plan in pairs])}
  left = built
  for pair in built:
    fewer = [other for other in left if other is not pair]
    if ledger.state(pair[0].number) == "pruned" and len(fewer) > 1 and shapes(fewer) == shapes(built):
      left = fewer
  return left


def _failed(job: Job, error: LoraExpError, ledger: Ledger) -> None:
  if ledger.ended(job.number):
    return
  job.error = error
  log.error("run %d: %s", job.number, error)
  ledger.add("failed", trial=job.number, code=error.code, reason=str(error))
  console.show_error(LoraExpError(f"run {job.number}: {error}"))


def show_packs(jobs: Sequence[Job], packs: Sequence[Sequence[int]]) -> None:
  """Which trials train together, and the memory that they are estimated to take together."""
  rows = []
  for number, members in enumerate(packs):
    cfgs = [jobs[n].cfg for n in members]
    first, need = cfgs[0], needed(cfgs)
    ranks = sorted({c.lora.rank for c in cfgs})
    rows.append((number, len(members), first.lora.method, ranks, sorted({c.train.seed for c in cfgs}),
                 sorted({c.optim.lr for c in cfgs}), "-" if need is None else nbytes(need.of(len(members))),
                 _span([jobs[n].number for n in members])))  # fmt: skip
  columns = ("pack", "trials", "lora", "ranks", "seeds", "lr", "memory", "runs")
  console.show_table("Packs: runs that train as one program", columns, rows)
  console.show(f"Memory there is: {nbytes(device_memory())}; a pack is as wide as fits, by the estimate of task=plan.")


def _span(numbers: Sequence[int]) -> str:
  whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
  return f"{numbers[0]}-{numbers[-1]}" if whole and len(numbers) > 1 else ", ".join(map(str, numbers))

"""The directory of a new run or sweep: created before anything runs, removed if training never started."""

import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config.errors import InUseError
from lora_exp.config.override_grammar import typed as typed_setting
from lora_exp.runtime.disk_errors import write_error
from lora_exp.runtime.run_files import CHECKPOINTS, CONFIG, LEDGER, LOCK, METRICS_FILE, MULTIRUN

RUN_MARKS = (CONFIG, METRICS_FILE, CHECKPOINTS, MULTIRUN)  # a directory with one of these contains a run or a sweep
TRAINING_MARKS = (METRICS_FILE, CHECKPOINTS, ".submitit")  # the run has started training, or is queued


@dataclass(frozen=True)
class Claim:
  """A directory that this process may write to, and its previous contents."""

  path: Path
  topmost_created: Path | None  # the topmost directory that was created for it; None: it existed
  entries_before: frozenset[str] = frozenset()

  def undo(self) -> None:
    """Removes new files and created directories, unless training has started."""
    entries = [entry for entry in _entries(self.path) if entry.name not in self.entries_before]
    if any(_training_began(entry) for entry in entries):
      return
    for entry in entries:
      if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
      else:
        entry.unlink()
    if self.topmost_created is not None:
      self._remove_created_directories(self.topmost_created)

  def _remove_created_directories(self, topmost: Path) -> None:
    for directory in (self.path, *self.path.parents):
      if directory.is_dir() and not _entries(directory):
        directory.rmdir()
      if directory == topmost:
        return


def claim_directory(path: Path, typed: bool, sweep: bool = False) -> Claim:
  """Creates `path`, or `path`-2, -3, … if it exists; a `typed` path is used unchanged.

  A `sweep` may continue in the directory of an earlier one.

  Raises InUseError if a typed path contains a run, InputError if it cannot be created, DiskError if the disk is full.
  """
  path = path.absolute()
  try:
    if typed and path.is_dir():
      return _claim_existing(path, sweep)
    return _claim_new(path, typed)
  except OSError as error:
    raise write_error(error, path) from error


def _claim_existing(path: Path, sweep: bool) -> Claim:
  names = frozenset(entry.name for entry in _entries(path))
  if sweep and LEDGER in names:
    return Claim(path, None, names)
  if marks := sorted(names & set(RUN_MARKS)):
    raise InUseError(f"{path}: already contains a run ({marks[0]}); choose another directory, "
                     f"or resume that run with {typed_setting('train.resume', str(path))}")
  (path / LOCK).touch()
  return Claim(path, None, names)


def _claim_new(path: Path, typed: bool) -> Claim:
  missing = [parent for parent in path.parents if not parent.exists()]
  path.parent.mkdir(parents=True, exist_ok=True)
  for n in itertools.count(1):
    attempt = path if n == 1 else path.with_name(f"{path.name}-{n}")
    try:
      attempt.mkdir()
      return Claim(attempt, missing[-1] if missing else attempt)
    except FileExistsError:
      if typed:
        raise
  raise AssertionError("itertools.count does not end")


def _training_began(entry: Path) -> bool:
  return any(entry.name == mark or any(entry.glob(f"**/{mark}")) for mark in TRAINING_MARKS)


def _entries(directory: Path) -> list[Path]:
  return list(directory.iterdir()) if directory.is_dir() else []

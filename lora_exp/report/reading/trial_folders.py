"""Finds the folders of a sweep's trials."""

from dataclasses import dataclass
from pathlib import Path

from lora_exp.report.reading.sweep_ledger import SweepLedger
from lora_exp.runtime.run_files import CONFIG, SUMMARY

WIDEST_GAP = 100  # without a ledger, numbers that exceed the count of folders by more are not trials (20261127)


@dataclass(frozen=True)
class TrialFolders:
  """The folders of a sweep's trials."""

  numbered: dict[int, Path]  # by the number of the trial
  named: list[Path]  # runs whose folder has another name
  missing: list[int]  # trials without a folder


def trial_folders(directory: Path, ledger: SweepLedger) -> TrialFolders:
  """The trials of the sweep in `directory`.

  A folder whose name is a number is a trial if it is in the ledger or contains the files of a run. Without a ledger,
  numbers must be consecutive except for gaps of deleted trials.
  """
  folders = [path for path in sorted(directory.iterdir()) if path.is_dir() and not path.name.startswith(".")]
  candidates = {int(path.name): path for path in folders if _is_number(path.name)}
  expected = set(ledger.trials) or _plausible(candidates)
  numbered = {n: path for n, path in sorted(candidates.items()) if n in expected or is_run(path)}
  named = [path for path in folders if path not in numbered.values() and is_run(path)]
  return TrialFolders(numbered, named, sorted(expected - set(numbered)) if numbered or named else [])


def is_run(path: Path) -> bool:
  """Whether a folder contains the files of a run."""
  return any((path / name).is_file() for name in (CONFIG, SUMMARY))


def _is_number(name: str) -> bool:
  """Whether a folder's name is a number as a sweep writes it, without leading zeros."""
  return name.isascii() and name.isdecimal() and str(int(name)) == name


def _plausible(candidates: dict[int, Path]) -> set[int]:
  """The trial numbers up to the largest plausible one."""
  bound = 2 * len(candidates) + WIDEST_GAP
  return set(range(max((n for n in candidates if n < bound), default=-1) + 1))

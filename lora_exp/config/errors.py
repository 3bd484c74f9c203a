"""The one error a person can cause, and the exit code each kind carries.

A task raises `LoraExpError` (or a kind of it) and never `SystemExit`, which would end a multirun at its first job;
`__main__` prints the message without a traceback and exits with the code.
"""

import difflib
from collections.abc import Iterable, Sequence

DONE, BUG, BAD_INPUT, IN_USE, NO_CHECKPOINT, DIVERGED, DISK, STOPPED = 0, 1, 2, 3, 4, 5, 6, 75


class LoraExpError(Exception):
  """What is wrong, where, and what to do, in words; `code` is the process's exit code."""

  code = BUG


class InputError(LoraExpError):
  """A bad config, file or argument: exit code 2. Takes one problem, or all that were found."""

  code = BAD_INPUT

  def __init__(self, problems: str | Sequence[str]):
    self.problems = [problems] if isinstance(problems, str) else list(problems)
    super().__init__("\n".join(self.problems))


class InUseError(LoraExpError):
  """Another process, or an earlier run, owns this run directory: exit code 3."""

  code = IN_USE


class NoCheckpointError(LoraExpError):
  """No checkpoint of the run can be used: exit code 4."""

  code = NO_CHECKPOINT


class DivergedError(LoraExpError):
  """The loss is no longer a finite number: exit code 5."""

  code = DIVERGED


class MemoryFullError(LoraExpError):
  """A program does not fit in the memory there is: exit code 1."""


class DiskError(LoraExpError):
  """The disk is full or failed while writing: exit code 6."""

  code = DISK


class StoppedError(LoraExpError):
  """Stopped by a signal (or `train.stop_at`) after a checkpoint, resumable: exit code 75."""

  code = STOPPED


class ReachedError(StoppedError):
  """Stopped at `train.stop_at`, as was asked: no reason for a sweep to stop as well."""


def nearest(word: str, choices: Iterable[str], n: int = 1) -> list[str]:
  """The `n` of `choices` spelt most like `word`, best first; empty if none is near."""
  return difflib.get_close_matches(word, list(choices), n=n, cutoff=0.5)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
  """'; did you mean X?' for the nearest spelling of `word`, or ''."""
  found = nearest(word, choices)
  return f"; did you mean {found[0]}?" if found else ""

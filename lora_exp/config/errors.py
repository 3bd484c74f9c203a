"""Errors that a user can cause, and the exit code of each.

A task raises `LoraExpError` or a subclass, and never `SystemExit`, which would end a multirun at its first job. The
command line prints the message without a traceback and exits with the code.
"""

import difflib
from collections.abc import Iterable, Sequence

DONE, BUG, BAD_INPUT, IN_USE, NO_CHECKPOINT, DIVERGED, DISK, STOPPED = 0, 1, 2, 3, 4, 5, 6, 75


class LoraExpError(Exception):
  """An error for the user: its message says what is wrong, where, and what to do. `code` is the exit code."""

  code = BUG


class InputError(LoraExpError):
  """A bad config, file or argument: exit code 2. Contains one or more problems."""

  code = BAD_INPUT

  def __init__(self, problems: str | Sequence[str]):
    self.problems = [problems] if isinstance(problems, str) else list(problems)
    super().__init__("\n".join(self.problems))


class InUseError(LoraExpError):
  """The run directory belongs to another process or to an earlier run: exit code 3."""

  code = IN_USE


class NoCheckpointError(LoraExpError):
  """The run has no usable checkpoint: exit code 4."""

  code = NO_CHECKPOINT


class DivergedError(LoraExpError):
  """The loss is NaN or infinite: exit code 5."""

  code = DIVERGED


class RewindError(DivergedError):
  """A step is not finite, and the run is to go back to its last checkpoint (`train.on_nan=rewind`)."""

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step  # the step that is not finite


class MemoryFullError(LoraExpError):
  """A program needs more memory than is available: exit code 1."""


class DiskError(LoraExpError):
  """The disk is full or writing failed: exit code 6."""

  code = DISK


class StoppedError(LoraExpError):
  """Stopped by a signal or by `train.stop_at`, after a checkpoint, and resumable: exit code 75."""

  code = STOPPED


class NotStartedError(StoppedError):
  """Stopped by a signal before training started; there is nothing to resume."""


class LostProcessError(StoppedError):
  """Another process of the run has ended or cannot be reached; the run is resumable from its last checkpoint."""


class ReachedError(StoppedError):
  """Stopped at `train.stop_at`, as requested; a sweep continues with its other trials."""


def nearest(word: str, choices: Iterable[str], n: int = 1, similarity: float = 0.5) -> list[str]:
  """At most `n` of `choices` whose spelling has at least this similarity (0 to 1) to `word`, best first."""
  return difflib.get_close_matches(word, list(choices), n=n, cutoff=similarity)


def did_you_mean(word: str, choices: Iterable[str], similarity: float = 0.5) -> str:
  """'; did you mean X?' for the nearest spelling of `word`, or ''."""
  found = nearest(word, choices, similarity=similarity)
  return f"; did you mean {found[0]}?" if found else ""

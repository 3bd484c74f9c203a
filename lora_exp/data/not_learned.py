"""Counts of the data that a run does not learn. They are made while rows are written, and shown before training."""

from collections import Counter
from dataclasses import dataclass

MOST_REASONS = 30  # counted one by one; all others are counted together


@dataclass(frozen=True)
class NotLearned:
  """One reason why something is not learned, how often it occurs, and where it occurs first."""

  unit: str  # what is counted, in the plural: rows, documents, answers, tokens
  reason: str  # "no response"
  count: int
  total: int | None = None  # the number of `unit` in the data, if it was counted
  first: str = ""  # "pairs.jsonl, line 7"

  @property
  def sentence(self) -> str:
    """Such as `20 of 40 answers: they lie beyond data.seq_len=64 (first: pairs.jsonl, line 7)`."""
    of_total = "" if self.total is None else f" of {self.total:,}"
    first = f" (first: {self.first})" if self.first else ""
    unit = self.unit.removesuffix("s") if self.count == 1 and self.total is None else self.unit
    return f"{self.count:,}{of_total} {unit}: {self.reason}{first}"


class NotLearnedTally:
  """Counts by (unit, reason), in the order in which they first occur."""

  def __init__(self) -> None:
    self._counts = Counter[tuple[str, str]]()
    self._totals = Counter[str]()
    self._first: dict[tuple[str, str], str] = {}

  def add_total(self, unit: str, count: int = 1) -> None:
    """Adds `count` to the total of `unit` in the data, learned or not."""
    self._totals[unit] += count

  def add(self, unit: str, reason: str, count: int = 1, first: str = "") -> None:
    """Adds `count` of `unit` that are not learned; 0 is ignored. Only the `first` of the first call is kept."""
    if count:
      if (unit, reason) not in self._counts and len(self._counts) >= MOST_REASONS:
        reason = "other reasons"
      self._counts[unit, reason] += count
      self._first.setdefault((unit, reason), first)

  def counted(self) -> tuple[NotLearned, ...]:
    """All counts so far."""
    return tuple(NotLearned(unit, reason, count, self._totals.get(unit), self._first[unit, reason])
                 for (unit, reason), count in self._counts.items())

"""The facts about a run that loggers use, and the interface of the objects that write to a logger's library."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class LoggedRun:
  """A run as its loggers see it. The trials of a sweep share the directory SWEEP and form a group."""

  run_dir: Path
  directory: Path  # of the logger's files: the run directory, or that of its sweep
  name: str  # as shown; a trial is named by its number and the settings that differ between trials
  id: str  # equal for a resumed run, different for every other run directory
  config: Mapping[str, Any]  # all settings, nested
  mode: str = "offline"  # offline | online
  project: str = "lora_exp"
  group: str | None = None
  job_type: str | None = None  # the method, of a trial
  tags: Sequence[str] = ()
  earlier_rows: Sequence[Mapping[str, Any]] = ()  # of a resumed run: the rows of metrics.jsonl before it


class LogWriter(Protocol):
  """Writes one run to a logger's library. Every method may block and raise."""

  def log(self, row: Mapping[str, Any]) -> None:
    """Logs one row of metrics.jsonl."""

  def summary(self, values: Mapping[str, Any]) -> None:
    """Logs the content of summary.json."""

  def finish(self, exit_code: int) -> None:
    """Ends the run with its exit code."""


def named_values(row: Mapping[str, Any]) -> dict[str, float]:
  """The values of a row of metrics.jsonl by the names that all loggers use, such as train/loss and eval/loss."""
  split = row.get("split", "train")
  return {f"{split}/{key}": value for key, value in row.items() if key not in ("step", "tokens", "split")}


def loss_by_tokens(row: Mapping[str, Any]) -> dict[str, float]:
  """The loss of a row by the name of its curve against tokens, such as loss_by_tokens/eval; {} without a loss."""
  return {f"loss_by_tokens/{row.get('split', 'train')}": row["loss"]} if "loss" in row and "tokens" in row else {}

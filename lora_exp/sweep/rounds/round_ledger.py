"""The rows of sweep.jsonl that describe a sweep in rounds: its plan, rounds, looks and dropped settings."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lora_exp.config.errors import InputError
from lora_exp.sweep.ledger import Ledger
from lora_exp.sweep.packs.launched_runs import LaunchedRuns
from lora_exp.sweep.rounds.looks import Look
from lora_exp.sweep.rounds.round_plan import TUNE, Round, RoundPlan, RoundTrial

NAMES = {"jobs": "settings or seeds", "tune": "hydra.sweeper.tune", "decide": "hydra.sweeper.decide"}  # of the plan


class RoundLedger:
  """Reads and writes the rounds of a sweep."""

  def __init__(self, plan: RoundPlan, runs: LaunchedRuns):
    self.plan, self.runs = plan, runs

  @property
  def ledger(self) -> Ledger:
    return self.runs.ledger

  def check_plan(self) -> None:
    """Records what the sweep compares. Raises InputError if the ledger has a sweep with another plan."""
    ledger, plan = self.ledger, self.plan.fixed()
    where = f"hydra.sweep.dir={self.runs.directory}"
    before = next((row for row in ledger.rows if row["event"] == "rounds"), None)
    if before is None:
      if ledger.rows:
        raise InputError(f"{where}: contains a sweep that is not in rounds; use another directory")
      ledger.add("rounds", **plan)
      return
    differing = {key: (before.get(key), value) for key, value in plan.items()
                 if _complete(before.get(key)) != _complete(value)}
    if differing:
      names = " and ".join(NAMES.get(key, key) for key in differing)
      raise InputError(f"{where}: the sweep was started with other {names}; {_to_continue(differing)}, or use another "
                       "directory")

  def recorded(self) -> list[Round]:
    """The rounds in the ledger."""
    rows = [row for row in self.ledger.rows if row["event"] == "round"]
    return [Round(row["why"], [RoundTrial(**trial) for trial in row["jobs"]]) for row in rows]

  def add(self, number: int, following: Round) -> None:
    """Adds a round; `tuning` has the trials that are not scored."""
    tuning = [trial.number for trial in following.trials if trial.purpose == TUNE]
    jobs = [asdict(trial) for trial in following.trials]
    self.ledger.add("round", round=number, why=following.why, tuning=tuning, jobs=jobs)

  def add_seconds(self, number: int, seconds: float) -> None:
    """Adds the time that a round was trained."""
    self.ledger.add("round_done", round=number, seconds=round(seconds, 1))

  def seconds(self) -> float:
    """The time that all rounds were trained."""
    return float(sum(row["seconds"] for row in self.ledger.rows if row["event"] == "round_done"))

  def add_drop(self, label: str, trials: Sequence[int], reason: str) -> None:
    """Records that the setting `label` was dropped, unless the ledger already has it."""
    if not any(row["event"] == "dropped" and row["setting"] == label for row in self.ledger.rows):
      self.ledger.add("dropped", setting=label, trials=list(trials), reason=reason)

  def add_looks(self, looks: Sequence[Look]) -> None:
    """Adds the looks that the ledger does not have."""
    assert self.plan.decision is not None, "there are looks"
    recorded = [row for row in self.ledger.rows if row["event"] == "look"]
    names = [setting.label for setting in self.plan.settings]
    for look in looks[len(recorded) :]:
      self.ledger.add(
        "look", seeds=look.seeds, level=look.level, of_level=self.plan.decision.level,
        answer=None if look.answer is None else names[look.answer], chance=look.chance,
        insufficient=[names[n] for n in look.insufficient], unjudged=[names[n] for n in look.unjudged],
      )  # fmt: skip


def _complete(value: Any) -> Any:
  """A value of a recorded plan, with the key `early` that decisions in older ledgers lack."""
  return {**value, "early": value.get("early")} if isinstance(value, dict) and "looks" in value else value


def _to_continue(differing: Mapping[str, tuple[Any, Any]]) -> str:
  """How to continue a sweep whose recorded values (first) differ from those of the command: with which overrides."""
  overrides = []
  for part in ("tune", "decide"):
    before, now = (_complete(value) for value in differing.get(part, (None, None)))
    if isinstance(before, dict) and isinstance(now, dict):
      changed = [key for key in now if before.get(key) != now[key]]
      overrides += [f"hydra.sweeper.{part}.{key}={_typed(before.get(key))}" for key in changed]
  if overrides and "jobs" not in differing:
    return f"add {' '.join(overrides)} to continue it"
  return "use the same command"


def _typed(value: Any) -> str:
  """A value as it is typed in an override: `[3,5]`, `null`."""
  if isinstance(value, list):
    return f"[{','.join(map(_typed, value))}]"
  if value is None:
    return "null"
  return str(value).lower() if isinstance(value, bool) else str(value)

"""What the adapters of a group learned, read from their files."""

from pathlib import Path

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.adapter_updates import Update, learned, one_thread, seeds_overlap, updates
from lora_exp.report.reading.run_record import RunRecord

MOST_SEEDS = 4  # whose directions are held against each other, every pair


@one_thread
def learn(directory: Path, group: Group) -> None:
  """Reads what the trials of `group` in the sweep `directory` learned into them, and what the seeds of each share."""
  for setting in group.settings:
    kept: list[dict[str, Update]] = []
    drawn = set()  # seeds of A among them: two of the same seed share their inputs from the start
    for trial in setting.trials:
      found = read(directory, trial, group)
      trial.learned = learned(directory / trial.path, found)
      seed = trial.config.get("train.seed")
      if found and trial.loss is not None and seed not in drawn and len(kept) < MOST_SEEDS:
        kept.append(found)
        drawn.add(seed)
    setting.overlap = seeds_overlap(kept)


def read(directory: Path, trial: RunRecord, group: Group | None = None) -> dict[str, Update]:
  """The updates of a trial; {} of one that left none, or damaged ones, of which `group` is told."""
  try:
    return updates(directory / trial.path, trial)
  except (ValueError, KeyError, TypeError) as error:
    if group is not None:
      group.unread.append(f"trial {trial}: {error}")
    return {}


def shown(group: Group) -> list[Setting]:
  """The settings of which something is known."""
  return [s for s in group.settings if s.of(lambda trial: trial.learned_mean("norm")).n]


def given(s: Setting) -> float:
  """The rank that a setting's modules had, on average."""
  return s.of(lambda trial: trial.learned_mean("rank")).mean

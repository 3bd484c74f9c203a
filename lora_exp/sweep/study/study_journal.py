"""The trials of a study in Optuna's journal. Trials are distinct, and a killed study continues with the same ones."""

import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from lora_exp.config import InputError
from lora_exp.runtime.saved_config import CHANGEABLE
from lora_exp.sweep.study.study_space import Choice, Interval, Study

JOURNAL = "study.jsonl"  # in the directory of the sweep
NAME = "lora_exp"  # name of the study in the journal
TRIES = 20  # number of samples that may repeat an earlier trial before one is drawn at random
optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudyJournal:
  """The journal of a study in its directory. The process must hold the lock of the directory.

  Raises InputError if the journal belongs to a study with other settings or has more than `n_trials` trials.
  """

  def __init__(self, cfg: Study, directory: Path):
    self.cfg, path = cfg, directory / JOURNAL
    _remove_incomplete_line(path)
    path.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)  # left by a killed process
    self.storage = JournalStorage(JournalFileBackend(str(path)))
    directions = [StudyDirection.MINIMIZE if sign > 0 else StudyDirection.MAXIMIZE for sign in cfg.signs]
    self.study = optuna.create_study(study_name=NAME, storage=self.storage, directions=directions, load_if_exists=True)
    self.space = {key: distribution(part) for key, part in cfg.space.items()}
    self._check(directory)

  def _check(self, directory: Path) -> None:
    """Compares the settings with those in the journal. Raises InputError if they differ."""
    now = fixed_settings(self.cfg)
    before = self.study.user_attrs.get("study")
    if before is None:
      self.study.set_user_attr("study", before := now)
    if differ := [key for key, value in now.items() if before.get(key) != value]:
      raise InputError(f"hydra.sweep.dir={directory}: the study was started with another {', '.join(differ)}; use "
                       "the same command, or another directory")
    if self.cfg.n_trials < len(self.all):
      raise InputError(
        f"hydra.sweeper.n_trials={self.cfg.n_trials}: is the total, but the study in {directory} already has "
        f"{len(self.all)} trials; give a larger number, or omit it"
      )

  @property
  def all(self) -> list[FrozenTrial]:
    """All trials in the order of their numbers."""
    return self.study.get_trials(deepcopy=False)

  def batch(self) -> list[FrozenTrial]:
    """The trials to train next: an interrupted batch or a new one; [] if the study has all its trials."""
    unfinished = [t for t in self.all if not t.state.is_finished()]
    start = unfinished[0].user_attrs["batch"][0] if unfinished else len(self.all)
    end = unfinished[0].user_attrs["batch"][1] if unfinished else min(start + self.cfg.width, self.cfg.n_trials)
    while len(self.all) < end and len(self.all) < self.cfg.size:
      self._add([start, end])
    return self.all[start:end]

  def _add(self, batch: list[int]) -> None:
    """Samples a trial and writes it as one line of the journal, so that a kill cannot leave it incomplete."""
    chosen = self._choose(len(self.all))
    self.study.add_trial(create_trial(
      state=TrialState.RUNNING, params=chosen.params, distributions=chosen.distributions,
      system_attrs=chosen.system_attrs, user_attrs={"batch": batch}))  # fmt: skip

  def _choose(self, number: int) -> FrozenTrial:
    """Samples a trial. It depends only on the seed, its number and the earlier trials, also in a resumed study."""
    tried = {_key(t.params) for t in self.all}
    for attempt in range(TRIES):
      copy = optuna.create_study(directions=self.study.directions, sampler=sampler(self.cfg, number, attempt))
      copy.add_trials(self.all)
      copy.ask(self.space)
      chosen = copy.trials[-1]
      if _key(chosen.params) not in tried:
        return chosen
    # The space is finite and almost exhausted.
    draw = random.Random(f"{self.cfg.seed} {number}")  # noqa: S311 - not for cryptography
    while _key(params := {k: draw.choice(_values(d)) for k, d in self.space.items()}) in tried:
      pass
    return create_trial(state=TrialState.RUNNING, params=params, distributions=self.space)

  def report(self, number: int, step: int, value: float) -> None:
    """Records the objective at a rung, once."""
    trial = self.all[number]
    if step not in trial.intermediate_values:
      self.storage.set_trial_intermediate_value(trial._trial_id, step, value)

  def tell(self, number: int, values: Sequence[float] | None, state: TrialState, reason: str | None = None) -> None:
    """Records how a trial ended."""
    if reason is not None:
      self.storage.set_trial_user_attr(self.all[number]._trial_id, "reason", reason)
    self.study.tell(number, values, state)


def fixed_settings(cfg: Study) -> dict[str, Any]:
  """The settings that must not change when a study is continued."""
  fixed = [text for text in cfg.fixed if not any(f"{_path(text)}.".startswith(f"{free}.") for free in CHANGEABLE)]
  space = {key: list(part.values) if isinstance(part, Choice) else asdict(part) for key, part in cfg.space.items()}
  names = ("repeats", "extra", "width", "sampler", "seed", "objectives", "rungs", "keep")
  return {"params": space, "settings": sorted(fixed), **{name: getattr(cfg, name) for name in names}}


def _remove_incomplete_line(path: Path) -> None:
  """Truncates the file after its last newline."""
  if path.exists():
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def _path(text: str) -> str:
  return text.partition("=")[0].lstrip("+~")


def distribution(part: Choice | Interval) -> BaseDistribution:
  """The Optuna distribution of a parameter."""
  if isinstance(part, Choice):
    return CategoricalDistribution(part.values)
  if part.integer:
    return IntDistribution(int(part.low), int(part.high), log=part.log, step=int(part.step or 1))
  return FloatDistribution(part.low, part.high, log=part.log, step=part.step)


def _values(part: BaseDistribution) -> Sequence[Any]:
  """Every value of a finite distribution."""
  if isinstance(part, CategoricalDistribution):
    return part.choices
  assert isinstance(part, IntDistribution | FloatDistribution) and part.step
  count = round((part.high - part.low) / part.step) + 1
  return [min(part.low + i * part.step, part.high) for i in range(count)]


def sampler(cfg: Study, number: int, attempt: int) -> BaseSampler:
  """The sampler of trial `number`, seeded by the study's seed, the number and the attempt."""
  seed = int(np.random.SeedSequence([cfg.seed, number, attempt]).generate_state(1)[0])
  if cfg.sampler == "nsga2":
    return NSGAIISampler(population_size=max(2, cfg.width), seed=seed)
  return TPESampler(seed=seed, multivariate=True) if cfg.sampler == "tpe" else RandomSampler(seed=seed)


def _key(params: Mapping[str, Any]) -> tuple:
  return tuple(sorted(params.items()))


def in_state(trials: Iterable[FrozenTrial], state: TrialState) -> list[FrozenTrial]:
  """The trials that are in `state`."""
  return [trial for trial in trials if trial.state == state]

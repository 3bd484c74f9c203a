"""Chooses the trials of the next round of a sweep from the results of earlier rounds."""

from collections.abc import Mapping, Sequence

from lora_exp.sweep.rounds.looks import Look, make_looks, read_scores
from lora_exp.sweep.rounds.round_plan import SCORE, TUNE, Results, Round, RoundPlan, RoundResult, RoundTrial, Tuning
from lora_exp.sweep.rounds.tuning_rounds import further_factor, scored_factors


class RoundMaker:
  """Decides the next round.

  `defaults` has the default of the tuned setting for each setting; `margin` is a share of the best setting's gain.
  """

  def __init__(self, plan: RoundPlan, defaults: Sequence[float | None], margin: float):
    self.plan, self.defaults, self.margin = plan, defaults, margin

  def next_round(self, trials: Sequence[RoundTrial], results: Results) -> Round | None:
    """The round after the `trials` of the earlier rounds; None if the sweep is complete."""
    if any(trial.purpose == SCORE and self.plan.settings[trial.setting].seeds for trial in trials):
      return self._further_seeds(trials, results)
    if self.plan.tuning is None:
      return self._first_scores()
    if not trials:
      return self._first_tuning(self.plan.tuning)
    penalties = tuning_penalties(self.plan, trials, results)
    return self._extension(penalties, self.plan.tuning, len(trials)) or self._scores(
      penalties, self.plan.tuning, len(trials)
    )

  def _first_scores(self) -> Round:
    """Every setting with every seed, without tuning."""
    jobs = [(n, None, seed) for n in range(len(self.plan.settings)) for seed in range(self._first_seeds(n) or 1)]
    seeds = "its first seed" if self.plan.first_seeds == 1 else "each of its first seeds"
    return Round(f"trains every setting with {seeds}", self._trials(SCORE, jobs, 0))

  def known_trials(self, trials: Sequence[RoundTrial]) -> int:
    """The number of trials that will follow the `trials` of the earlier rounds, as far as it is known."""
    if any(trial.purpose == SCORE and self.plan.settings[trial.setting].seeds for trial in trials):
      return 0
    return sum(self._first_seeds(n) for n in range(len(self.plan.settings)))

  def _first_seeds(self, index: int) -> int:
    """The number of seeds with which a setting is scored first; 0 for a reference."""
    setting = self.plan.settings[index]
    return len(setting.seeds[: self.plan.first_seeds if setting.compared else self.plan.seeds_at(0)])

  def looks(self, trials: Sequence[RoundTrial], results: Results) -> list[Look]:
    """The looks so far; none in a sweep that does not stop by itself."""
    if self.plan.decision is None:
      return []
    return make_looks(self.plan, self.plan.decision, self.margin, trials, results)

  def _further_seeds(self, trials: Sequence[RoundTrial], results: Results) -> Round | None:
    """More seeds of the settings that are left; None if the sweep is complete."""
    decision = self.plan.decision
    if decision is None:
      return None
    looks, trained = self.looks(trials, results), read_scores(self.plan, trials, results).trained
    if not looks:
      return self._more(trials, [n for n in trained if trained[n] < decision.looks[0]], decision.looks[0])
    if not looks[-1].open_settings or looks[-1].futile:
      return None
    return self._more(trials, looks[-1].open_settings, decision.looks[len(looks)])

  def _more(self, trials: Sequence[RoundTrial], settings: Sequence[int], count: int) -> Round | None:
    """A round that brings each of `settings` to `count` seeds; None if all have them."""
    scored = [trial for trial in trials if trial.purpose == SCORE]
    factors = {trial.setting: trial.factor for trial in scored}
    jobs = [(n, factors[n], seed) for n in settings for seed in range(sum(t.setting == n for t in scored), count)]
    if not jobs:
      return None
    names = ", ".join(self.plan.settings[n].label for n in settings)
    return Round(f"adds seeds to {names}, up to {count} of each", self._trials(SCORE, jobs, len(trials)))

  def _first_tuning(self, tuning: Tuning) -> Round:
    """Every setting at all factors with the tuning seed, and the references."""
    tuned = [n for n, setting in enumerate(self.plan.settings) if setting.seeds]
    trials = self._trials(TUNE, [(n, factor, -1) for n in tuned for factor in tuning.factors], 0)
    references = [(n, None, 0) for n, setting in enumerate(self.plan.settings) if not setting.seeds]
    trials += self._trials(SCORE, references, len(trials))
    why = (f"tunes {tuning.setting} of {_count(len(tuned), 'setting')} at {_listed(tuning.factors)} times its default, "
           f"with seed {tuning.seed}")
    return Round(why, trials)

  def _extension(self, penalties: Mapping[int, Mapping[float, float]], tuning: Tuning, first: int) -> Round | None:
    """One more factor for each setting whose best is at an edge."""
    further = {n: further_factor(by_factor, tuning) for n, by_factor in penalties.items()}
    jobs = [(n, factor, -1) for n, factor in further.items() if factor is not None]
    if not jobs:
      return None
    names = "; ".join(f"{self.plan.settings[n].label} at {factor:g}" for n, factor, _ in jobs)
    return Round(f"tries a further value where the best is the lowest or highest: {names}",
                 self._trials(TUNE, jobs, first))

  def _scores(self, penalties: Mapping[int, Mapping[float, float]], tuning: Tuning, first: int) -> Round | None:
    """The chosen factors of each setting with the scoring seeds."""
    jobs = [(n, factor, seed) for n, by_factor in penalties.items() for factor in scored_factors(by_factor, tuning)
            for seed in range(self._first_seeds(n))]
    if not jobs:
      return None
    neighbour = " and its better neighbour" if tuning.neighbour else ""
    return Round(f"scores the best value{neighbour} of each setting with other seeds", self._trials(SCORE, jobs, first))

  def _trials(self, purpose: str, jobs: Sequence[tuple[int, float | None, int]], first: int) -> list[RoundTrial]:
    """Trials (setting, factor, seed) with their overrides, numbered from `first`."""
    return [RoundTrial(number, setting, purpose, factor, seed, self._overrides(setting, factor, seed))
            for number, (setting, factor, seed) in enumerate(jobs, first)]

  def _overrides(self, index: int, factor: float | None, seed: int) -> list[str]:
    """The overrides of one trial."""
    setting, tuning = self.plan.settings[index], self.plan.tuning
    overrides = list(setting.overrides)
    if factor is not None and tuning is not None:
      overrides = [text for text in overrides if not text.startswith(f"{tuning.setting}=")]
      overrides.append(f"{tuning.setting}={self._value(index, factor)!r}")
    if seed >= 0:
      return [*overrides, *(setting.seeds[seed] if setting.seeds else [])]
    assert tuning is not None
    keys = [text.partition("=")[0] for text in setting.seeds[0]] or ["seed"]
    return [*overrides, *(f"{key}={tuning.seed}" for key in keys)]

  def _value(self, index: int, factor: float) -> float:
    """The tuned setting at `factor`, to six significant digits; at factor 1 exactly its default."""
    default = self.defaults[index]
    assert default is not None
    return default if factor == 1 else float(f"{default * factor:.6g}")


def tuning_penalties(
  plan: RoundPlan, trials: Sequence[RoundTrial], results: Results
) -> dict[int, dict[float, float]]:
  """Penalties by factor for each tuned setting, without trials that failed; settings without any are left out."""
  found: dict[int, dict[float, float]] = {}
  for trial in trials:
    penalty = results.get(trial.number, RoundResult()).penalty
    if trial.purpose == TUNE and trial.factor is not None and penalty is not None:
      found.setdefault(trial.setting, {})[trial.factor] = penalty
  return dict(sorted(found.items()))


def _listed(factors: Sequence[float]) -> str:
  return ", ".join(f"{factor:g}" for factor in factors)


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"

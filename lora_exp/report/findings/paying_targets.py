"""Findings: which targets are worth adapting: by parameters, by gain per parameter, and at equal parameters."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from lora_exp.report.findings.finding import (
  FEW_SEEDS,
  MOST_CONTEXTS,
  Finding,
  capital,
  confidence,
  evidence,
  in_context,
  joined,
)
from lora_exp.report.findings.phrases import margin_text, more_seeds_sentence, state_sentences, tried_sentence
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK, TARGETS
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.judgement import INSUFFICIENT, SUFFICIENT, judge
from lora_exp.report.verdicts.tuning import Level, best_of, contexts, levels_of
from lora_exp.report.verdicts.verdict import Verdict, is_better_than_each, judge_levels

TOPIC = "Targets"
QUESTION = "Which targets are worth adapting?"


def paying_targets(group: Group) -> Iterator[Finding]:
  """Which targets are worth adapting: the cheapest sufficient ones, gain per parameter, gain at equal parameters."""
  for where, settings in contexts(group, TARGETS, [RANK])[:MOST_CONTEXTS]:
    levels = levels_of(settings, TARGETS)
    if levels[0].chosen.budget is not None and len({s.budget for s in settings}) == 1:
      yield _at_one_budget(group, levels, where)
      continue
    yield _fewest_parameters(group, levels, where)
    yield from _gain_by_parameter(group, levels, where)
    yield from _at_equal_parameters(group, settings, where)


def _fewest_parameters(group: Group, levels: Sequence[Level], where: str) -> Finding:
  """The targets with the fewest parameters that are shown to be sufficient."""
  verdict = judge_levels(group, levels, TARGETS)
  named = min(verdict.sufficient, key=_parameters, default=None)
  at, margin = in_context(where), margin_text(verdict)
  if named and not verdict.doubts:
    answer = (f"It pays to adapt {named.value}{at}: of the targets shown to be within {margin} of the best gain "
              f"(confidence {confidence(verdict)}), it has the fewest parameters ({named.chosen.trainable or 0:,}).")
  else:
    why = joined(verdict.doubts) or f"none is shown to be within {margin} of the best gain"
    answer = f"Which targets are worth adapting is not settled{at}: {why}."
  return _targets_finding(group, verdict, named, answer, where)


def _targets_finding(group: Group, verdict: Verdict, named: Level | None, answer: str, where: str) -> Finding:
  concluded = named is not None and not verdict.doubts
  tried = tried_sentence(group, verdict.levels, "target")
  parts = [answer, state_sentences(verdict), tried, more_seeds_sentence(verdict)]
  text = " ".join(part for part in parts if part)
  if verdict.notes:
    text += f" Not tuned alike: {joined(list(verdict.notes.values()))}."
  values = {"targets": named.value if named and concluded else None, "best": verdict.best.value, "where": where,
            "sufficient": [level.value for level in verdict.sufficient],
            "insufficient": [level.value for level in verdict.insufficient]}
  return Finding(TOPIC, text, evidence(verdict), concluded, values, QUESTION, answer)


def _gain_by_parameter(group: Group, levels: Sequence[Level], where: str) -> Iterator[Finding]:
  """The mean gain of each target per thousand trainable parameters, and whether one is shown to gain most."""
  steady = sorted((level for level in levels if level.gains and not level.diverged and level.chosen.trainable),
                  key=_rate, reverse=True)
  if len(steady) < 2:
    return
  words = joined([f"{level.label} {_rate(level):.4g} ({_parameters(level):,} parameters)" for level in steady])
  text = f"Mean gain {group.metric.better_side} the base per thousand parameters{in_context(where)}: {words}."
  rates = [{seed: gain / _parameters(level) for seed, gain in level.gains.items()} for level in steady]
  first = is_better_than_each([*rates[1:], rates[0]])
  if first:
    text += f" Shown to gain most per parameter (confidence {confidence()}): {steady[0].label}."
  else:
    text += " None of them is shown to gain most per parameter."
  trials = joined([level.chosen.trial_numbers for level in steady])
  yield Finding(TOPIC, text, f"trials {trials}. Test: the first against each other one, one-sided.", first)


def _at_one_budget(group: Group, levels: Sequence[Level], where: str) -> Finding:
  """The best targets at one number of parameters, which ranks match as closely as whole numbers allow."""
  verdict = judge_levels(group, levels, TARGETS)
  at, margin = in_context(where), margin_text(verdict)
  fewest, most = (f"{pick(level.chosen.trainable or 0 for level in levels):,}" for pick in (min, max))
  each = f"{most if fewest == most else f'{fewest} to {most}'} trainable parameters each"
  sufficient = verdict.sufficient
  only = sufficient[0] if len(sufficient) == 1 and not verdict.undecided else None
  if verdict.doubts:
    answer = f"Which targets are worth adapting with {each} is not settled{at}: {joined(verdict.doubts)}."
  elif only:
    answer = (f"With {each}{at}, it pays to adapt {only.value}: every other target is shown to be more than {margin} "
              f"of the best gain short (confidence {confidence(verdict)}).")
  elif sufficient:
    names = ", ".join(str(level.value) for level in sufficient)
    answer = (f"With {each}{at}, shown to be within {margin} of the best gain (confidence {confidence(verdict)}): "
              f"{names}.")
  else:
    answer = (f"Which targets are worth adapting with {each} is not settled{at}: none is shown to be within {margin} "
              "of the best gain.")
  return _targets_finding(group, verdict, _best_sufficient(verdict), answer, where)


def _best_sufficient(verdict: Verdict) -> Level | None:
  """The best of the sufficient levels by its mean."""
  return verdict.best if verdict.best in verdict.sufficient else next(iter(verdict.sufficient), None)


def _at_equal_parameters(group: Group, settings: Sequence[Setting], where: str) -> Iterator[Finding]:
  """The scores of the targets at one number of parameters, interpolated on each one's curve over ranks."""
  curves = _curves(settings)
  low = max(curve[0].trainable or 0 for curve in curves.values())
  high = min(curve[-1].trainable or 0 for curve in curves.values())
  counts = [s.trainable or 0 for s in settings]
  if low <= 0 or (low > high and max(counts) > 1.1 * min(counts)):
    return
  count = float(np.sqrt(low * high)) if low <= high else float(low)
  gains = {targets: _interpolated(curve, count) for targets, curve in curves.items()}
  if not all(gains.values()) or any(s.diverged for curve in curves.values() for s in curve):
    return
  judged = judge(gains, group.margin)
  few_seeds = min(map(len, gains.values())) < SEEDS_NEEDED
  words = [f"{targets} {np.mean(list(by_seed.values())):.4f}{_state(judged.state(targets))}"
           for targets, by_seed in sorted(gains.items(), key=_mean_gain, reverse=True)]
  text = (f"Mean gain in {group.metric.label} at about {count:,.0f} parameters each{in_context(where)}: "
          f"{', '.join(words)}; margin {group.margin * 100:g} % of the best gain.")
  trials = joined([", ".join(s.trial_numbers for s in curve) for curve in curves.values()])
  states = {targets: judged.state(targets) for targets in gains}
  yield Finding(TOPIC, capital(text) + (FEW_SEEDS if few_seeds else ""), f"trials {trials}", not few_seeds,
                {"parameters": count, "states": states})


def _state(state: str) -> str:
  return f" ({state})" if state in (SUFFICIENT, INSUFFICIENT) else ""


def _curves(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
  """Targets -> the best setting for each number of parameters, by that number."""
  by_size: dict[str, dict[int, list[Setting]]] = {}
  for s in settings:
    by_size.setdefault(s.values[TARGETS], {}).setdefault(s.trainable or 0, []).append(s)
  return {targets: [best_of(sizes[size]) for size in sorted(sizes)] for targets, sizes in by_size.items()}


def _interpolated(curve: Sequence[Setting], count: float) -> dict[tuple, float]:
  """Seeds -> the gain at `count` parameters, linear in their logarithm; the seeds that every setting of it has."""
  x = [math.log(s.trainable or 1) for s in curve]
  seeds = [key for key in curve[0].gains if all(key in s.gains for s in curve)]
  return {key: float(np.interp(math.log(count), x, [s.gains[key] for s in curve])) for key in seeds}


def _mean_gain(item: tuple[str, dict[tuple, float]]) -> float:
  return float(np.mean(list(item[1].values())))


def _parameters(level: Level) -> float:
  return level.chosen.trainable or 0


def _rate(level: Level) -> float:
  """The mean gain per thousand parameters."""
  return level.gain.mean / _parameters(level) * 1000

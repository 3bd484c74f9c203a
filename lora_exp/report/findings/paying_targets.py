"""Findings: which targets pay, by parameters, by gain for each parameter, and at equal parameters."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora_exp.report.findings.finding import (
  FEW_SEEDS,
  MOST_CONTEXTS,
  Finding,
  best_sentence,
  capital,
  evidence,
  in_context,
  joined,
)
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import RANK, TARGETS
from lora_exp.report.statistics.estimates import difference
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, best_by, best_of, contexts
from lora_exp.report.verdicts.verdict import Verdict, judge, not_worse

TOPIC = "Targets"


def paying_targets(group: Group) -> Iterator[Finding]:
  """Which targets pay: the fewest parameters that are enough, gain by parameter, loss at equal parameters."""
  for where, settings in contexts(group, TARGETS, [RANK])[:MOST_CONTEXTS]:
    levels = list(best_by(settings, TARGETS).values())
    if levels[0].budget is not None and len({s.budget for s in settings}) == 1:
      yield _at_one_budget(group, levels, where)
      continue
    yield _fewest_parameters(group, levels, where)
    yield from _gain_by_parameter(group, levels, where)
    yield from _at_equal_parameters(group, settings, where)


def _fewest_parameters(group: Group, levels: Sequence[Setting], where: str) -> Finding:
  """The targets with the fewest parameters that are not measurably worse than the best."""
  verdict = judge(group, levels, _parameters, TARGETS)
  best, chosen, at = verdict.best, verdict.chosen, in_context(where)
  values = {"targets": chosen.values[TARGETS], "best": best.values[TARGETS], "where": where}
  if verdict.doubts:
    text = f"Which targets pay is not concluded{at}: {joined(verdict.doubts)}. {best_sentence(best)}"
    return Finding(TOPIC, text, evidence(verdict), False, values)
  d = verdict.to_best(chosen)
  if d is None:
    why = f"the {group.metric.best_word} {group.metric.label} of those tried"
  else:
    why = (f"the fewest parameters that are not measurably worse than the best, {best.label} ({best.trainable:,}; "
           f"difference {d.text(sign=True)})")
  text = (f"It pays to adapt {chosen.values[TARGETS]}{at}: {chosen.label} reaches {chosen.score.text()} with "
          f"{chosen.trainable or 0:,} parameters, {why}.")
  worse = [f"{s.label} {d.text(sign=True)}" for s, d in verdict.against
           if s is not chosen and not not_worse(d, verdict.tolerance)]
  if worse:
    text += f" Measurably worse than the best: {joined(worse)}."
  return Finding(TOPIC, text, evidence(verdict), True, values)


def _gain_by_parameter(group: Group, levels: Sequence[Setting], where: str) -> Iterator[Finding]:
  """The gain of each of the targets for a thousand trainable parameters."""
  rates = [(s.gain.mean / s.trainable * 1000, s) for s in levels if s.trainable and s.gain.n]
  if len(rates) < 2:
    return
  rates.sort(key=_rate, reverse=True)
  words = joined([f"{s.label} {rate:.4g} ({s.trainable:,} parameters)" for rate, s in rates])
  text = f"Gain {group.metric.better_side} the base for each thousand parameters{in_context(where)}: {words}."
  yield Finding(TOPIC, text, f"trials {joined([s.trial_numbers for _, s in rates])}")


def _at_one_budget(group: Group, levels: Sequence[Setting], where: str) -> Finding:
  """The targets that do most with one number of parameters, which ranks reach as nearly as whole numbers can."""
  verdict = judge(group, levels, penalty, TARGETS)
  best, at = verdict.best, in_context(where)
  fewest, most = (f"{pick(s.trainable or 0 for s in levels):,}" for pick in (min, max))
  each = f"{most if fewest == most else f'{fewest} to {most}'} trainable parameters each"
  values = {"targets": best.values[TARGETS], "best": best.values[TARGETS], "where": where}
  if verdict.doubts:
    text = f"Which targets pay with {each} is not concluded{at}: {joined(verdict.doubts)}. {best_sentence(best)}"
    return Finding(TOPIC, text, evidence(verdict), False, values)
  ties, worse = _compared(verdict, tied=True), _compared(verdict, tied=False)
  targets = best.values[TARGETS]
  pays = f"{targets} has the {group.metric.best_word} {group.metric.label}" if ties else f"it pays to adapt {targets}"
  text = f"With {each}{at}, {pays}: {best.label} reaches {best.score.text()}."
  text += f" Not measurably worse: {ties}." if ties else ""
  text += f" Measurably worse: {worse}." if worse else ""
  return Finding(TOPIC, text, evidence(verdict), True, values)


def _compared(verdict: Verdict, tied: bool) -> str:
  """The settings that are (`tied`), or are not, as good as the best, by score."""
  others = sorted(verdict.against, key=lambda pair: pair[0].penalty)
  return joined([f"{s.label} {d.text(sign=True)}" for s, d in others if not_worse(d, verdict.tolerance) == tied])


def _at_equal_parameters(group: Group, settings: Sequence[Setting], where: str) -> Iterator[Finding]:
  """The scores of the targets at one number of parameters, interpolated on each one's curve over ranks."""
  curves = _curves(settings)
  low = max(curve[0].trainable or 0 for curve in curves.values())
  high = min(curve[-1].trainable or 0 for curve in curves.values())
  counts = [s.trainable or 0 for s in settings]
  if low <= 0 or (low > high and max(counts) > 1.1 * min(counts)):
    return
  count = float(np.sqrt(low * high)) if low <= high else float(low)
  penalties = {targets: _interpolated(curve, count) for targets, curve in curves.items()}
  if not all(penalties.values()):
    return
  means = {targets: float(np.mean(list(by_seed.values()))) for targets, by_seed in penalties.items()}
  best, *others = sorted(means, key=means.__getitem__)
  sign = group.metric.sign
  words = [f"{best} {sign * means[best]:.4f}"]
  for targets in others:
    d = difference(penalties[targets], penalties[best])
    words.append(f"{targets} {sign * means[targets]:.4f} ({d.text(sign=True)})")
  few_seeds = min(map(len, penalties.values())) < SEEDS_NEEDED
  text = f"{capital(group.metric.label)} at about {count:,.0f} parameters each{in_context(where)}: {', '.join(words)}."
  trials = joined([", ".join(s.trial_numbers for s in curve) for curve in curves.values()])
  yield Finding(TOPIC, text + (FEW_SEEDS if few_seeds else ""), f"trials {trials}", not few_seeds,
                {"parameters": count, "order": [best, *others]})


def _curves(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
  """Targets -> the best setting for each number of parameters, by that number."""
  by_size: dict[str, dict[int, list[Setting]]] = {}
  for s in settings:
    by_size.setdefault(s.values[TARGETS], {}).setdefault(s.trainable or 0, []).append(s)
  return {targets: [best_of(sizes[size]) for size in sorted(sizes)] for targets, sizes in by_size.items()}


def _interpolated(curve: Sequence[Setting], count: float) -> dict[tuple, float]:
  """Seeds -> the penalty at `count` parameters, linear in their logarithm; the seeds that every setting of it has."""
  x = [np.log(s.trainable or 1) for s in curve]
  seeds = [key for key in curve[0].penalties if all(key in s.penalties for s in curve)]
  return {key: float(np.interp(np.log(count), x, [s.penalties[key] for s in curve])) for key in seeds}


def _parameters(setting: Setting) -> float:
  return setting.trainable or 0


def _rate(pair: tuple[float, Setting]) -> float:
  return pair[0]

"""Findings: which targets pay."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora_exp.report.findings.finding import MOST_CONTEXTS, RANK, TARGETS, Finding, capital, evidence, joined, lowest
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.statistics.estimates import difference
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, best_by, best_of, contexts
from lora_exp.report.verdicts.verdict import enough, not_worse


def targets(group: Group) -> Iterator[Finding]:
  """Which targets pay: the fewest parameters that are enough, gain by parameter, loss at equal parameters."""
  for where, settings in contexts(group, TARGETS, [RANK])[:MOST_CONTEXTS]:
    levels = list(best_by(settings, TARGETS).values())
    if levels[0].budget is not None and len({s.budget for s in settings}) == 1:
      yield _one_budget(group, levels, where)
      continue
    verdict = enough(group, levels, lambda s: s.trainable or 0, TARGETS)
    at = f" ({where})" if where else ""
    chosen = verdict.chosen
    facts = {"targets": chosen.values[TARGETS], "best": verdict.best.values[TARGETS], "where": where}
    d = verdict.to_best(chosen)
    if verdict.doubts:
      yield Finding("Targets", f"Which targets pay is not concluded{at}: {joined(verdict.doubts)}. "
                    f"{lowest(verdict.best)}", evidence(verdict), False, facts)
    else:
      end = f"the {group.metric.best_word} {group.metric.label} of those tried" if d is None else (
        f"the fewest parameters that are not measurably worse than the best, {verdict.best.label} "
        f"({verdict.best.trainable:,}; difference {d.text(sign=True)})")
      worse = [f"{s.label} {d.text(sign=True)}" for s, d in verdict.against
               if s is not chosen and not not_worse(d, verdict.tolerance)]
      text = (f"It pays to adapt {chosen.values[TARGETS]}{at}: {chosen.label} reaches {chosen.score.text()} with "
              f"{chosen.trainable or 0:,} parameters, {end}.")
      text += f" Measurably worse than the best: {'; '.join(worse)}." if worse else ""
      yield Finding("Targets", text, evidence(verdict), True, facts)
    rates = [(s.gain.mean / s.trainable * 1000, s) for s in levels if s.trainable and s.gain.n]
    if len(rates) > 1:
      rates.sort(key=lambda pair: -pair[0])
      words = "; ".join(f"{s.label} {r:.4g} ({s.trainable:,} parameters)" for r, s in rates)
      yield Finding("Targets", f"Gain {group.metric.better_side} the base for each thousand parameters{at}: {words}.",
                    f"trials {'; '.join(s.names for _, s in rates)}")
    yield from _equal_parameters(group, settings, at)


def _one_budget(group: Group, levels: Sequence[Setting], where: str) -> Finding:
  """Where one number of parameters does most; ranks are whole, so that each place holds nearly as many."""
  verdict = enough(group, levels, lambda s: s.penalty, TARGETS)
  least, most = (f"{pick(s.trainable or 0 for s in levels):,}" for pick in (min, max))
  each = f"{most if least == most else f'{least} to {most}'} trainable parameters each"
  at = f" ({where})" if where else ""
  facts = {"targets": verdict.best.values[TARGETS], "best": verdict.best.values[TARGETS], "where": where}
  if verdict.doubts:
    return Finding("Targets", f"Which targets pay with {each} is not concluded{at}: {joined(verdict.doubts)}. "
                   f"{lowest(verdict.best)}", evidence(verdict), False, facts)
  order = sorted(verdict.against, key=lambda pair: pair[0].penalty)
  said = lambda tied: "; ".join(f"{s.label} {d.text(sign=True)}" for s, d in order
                                if not_worse(d, verdict.tolerance) == tied)
  ties, worse = said(True), said(False)
  place = verdict.best.values[TARGETS]
  pays = f"{place} has the {group.metric.best_word} {group.metric.label}" if ties else f"it pays to adapt {place}"
  text = f"With {each}{at}, {pays}: {verdict.best.label} reaches {verdict.best.score.text()}."
  text += f" Not measurably worse: {ties}." if ties else ""
  text += f" Measurably worse: {worse}." if worse else ""
  return Finding("Targets", text, evidence(verdict), True, facts)


def _equal_parameters(group: Group, settings: Sequence[Setting], at: str) -> Iterator[Finding]:
  """The metric of the targets at one number of parameters, read off each one's own curve over ranks."""
  curves: dict[str, list[Setting]] = {}
  for s in settings:
    curves.setdefault(s.values[TARGETS], []).append(s)
  lines = {name: sorted(_thrifty(group), key=lambda s: s.trainable or 0) for name, group in curves.items()}
  low = max(line[0].trainable or 0 for line in lines.values())
  high = min(line[-1].trainable or 0 for line in lines.values())
  equal = max(s.trainable or 0 for s in settings) <= 1.1 * min(s.trainable or 0 for s in settings)
  if low <= 0 or (low > high and not equal):
    return
  place = float(np.sqrt(low * high)) if low <= high else float(low)
  read = {name: {seeds: float(np.interp(np.log(place), [np.log(s.trainable or 1) for s in line],
                                        [s.penalties[seeds] for s in line]))
                 for seeds in line[0].scores if all(seeds in s.scores for s in line)} for name, line in lines.items()}
  if not all(read.values()):
    return
  means = {name: float(np.mean(list(values.values()))) for name, values in read.items()}
  order = sorted(means, key=means.__getitem__)
  sign = group.metric.sign
  words = [f"{order[0]} {sign * means[order[0]]:.4f}"]
  above = {name: difference(read[name], read[order[0]]) for name in order[1:]}
  words += [f"{name} {sign * means[name]:.4f} ({d.text(sign=True)})" for name, d in above.items()]
  few = min(map(len, read.values())) < SEEDS_NEEDED
  label = capital(group.metric.label)
  yield Finding("Targets", f"{label} at about {place:,.0f} parameters each{at}: {', '.join(words)}."
                + (" Fewer than three seeds: no order is concluded." if few else ""),
                f"trials {'; '.join(', '.join(s.names for s in line) for line in lines.values())}", not few,
                {"parameters": place, "order": order})


def _thrifty(settings: Sequence[Setting]) -> list[Setting]:
  """The best setting for each number of parameters."""
  groups: dict[int, list[Setting]] = {}
  for s in settings:
    groups.setdefault(s.trainable or 0, []).append(s)
  return [best_of(group) for group in groups.values()]

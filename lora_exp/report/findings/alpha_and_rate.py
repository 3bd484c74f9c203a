"""Findings: whether alpha mattered, and the best learning rate."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora_exp.report.findings.finding import (
  MOST_CONTEXTS,
  MOST_LINES,
  Finding,
  capital,
  evidence,
  in_context,
  joined,
)
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import ALPHA, METHOD, RANK, RATE, key_value
from lora_exp.report.statistics.estimates import difference
from lora_exp.report.statistics.fits import fit_parabola
from lora_exp.report.verdicts.tuning import at_edges, best_by, best_of, contexts, is_tuned
from lora_exp.report.verdicts.verdict import judge, not_worse, tolerance_of


def alpha_effect(group: Group) -> Iterator[Finding]:
  """Whether alpha mattered once the rate was tuned for each."""
  for where, settings in contexts(group, ALPHA)[:MOST_CONTEXTS]:
    levels = list(best_by(settings, ALPHA).values())
    verdict = judge(group, levels, penalty, ALPHA)
    worst = max(levels, key=penalty)
    d = verdict.to_best(worst) or difference(worst.penalties, verdict.best.penalties)
    spread = f"{worst.label} is {d.text(sign=True)} {group.metric.worse_side} {verdict.best.label}"
    doubt = joined(verdict.doubts)
    if len({s.values.get(RATE) for s in settings}) < 2:
      doubt = "the rate was the same for each, and a larger alpha acts as a larger rate; sweep optim.lr too"
    if doubt:
      text = f"Whether alpha matters is not concluded{in_context(where)}: {doubt}. {capital(spread)}."
      yield Finding("Alpha", text, evidence(verdict), False)
      continue
    mattered = not not_worse(d, verdict.tolerance)
    text = (f"Alpha {'mattered' if mattered else 'did not matter measurably'} once the rate was tuned for each"
            f"{in_context(where)}: {spread}, the best of the alphas.")
    yield Finding("Alpha", text, evidence(verdict), True, {"mattered": mattered, "where": where})


def best_rate(group: Group) -> Iterator[Finding]:
  """The best learning rate of each rank (or of each other setting), as tried and by a parabola in log lr."""
  answers, at_edge, trials = [], [], []
  for name, settings in _with_rates(group):
    by_rate = best_by(settings, RATE)
    if len(by_rate) < 2:
      continue
    best = best_of(by_rate.values())
    answers.append(f"{name}{best.values[RATE]:g}{_fitted(by_rate)}")
    at_edge += at_edges(group, best, tolerance_of(settings))
    trials.append(best.trial_numbers)
  if not answers:
    return
  rest = f"; and of {len(answers) - MOST_LINES} more" if len(answers) > MOST_LINES else ""
  text = f"Best learning rate by held-out {group.metric.label}: {joined(answers[:MOST_LINES])}{rest}."
  if at_edge:
    text += f" Not settled: {joined(list(dict.fromkeys(at_edge)))}."
  yield Finding("Rate", text, f"trials {joined(trials)}", not at_edge)


def _with_rates(group: Group) -> list[tuple[str, Sequence[Setting]]]:
  """(name with a colon, settings) that differ in their rate, and in other tuned keys than rank (or else method)."""
  main = RANK if RANK in group.keys else METHOD
  fixed = [k for k in group.keys if k != RATE and (k == main or not is_tuned(k))]
  found: dict[tuple, list[Setting]] = {}
  for setting in group.adapted:
    if RATE in setting.values:
      found.setdefault(tuple((k, setting.values.get(k)) for k in fixed), []).append(setting)
  names = (", ".join(key_value(k, v) for k, v in values if v is not None) for values in found)
  return [(f"{name}: " if name else "", settings) for name, settings in zip(names, found.values(), strict=True)]


def _fitted(by_rate: dict[float, Setting]) -> str:
  """The vertex of the fitted parabola, in words; nothing if it lies outside of what was tried."""
  fit = fit_parabola([float(np.log(lr)) for lr in by_rate], [s.penalty for s in by_rate.values()])
  if fit is None or not min(by_rate) <= np.exp(fit.vertex) <= max(by_rate):
    return ""
  return f" (fitted {np.exp(fit.vertex):.2g})"

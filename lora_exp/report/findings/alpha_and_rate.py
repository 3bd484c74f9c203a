"""Findings: whether alpha mattered, and the best learning rate."""

from collections.abc import Iterator

import numpy as np

from lora_exp.report.findings.finding import (
  ALPHA,
  MOST_CONTEXTS,
  MOST_LINES,
  RANK,
  RATE,
  Finding,
  capital,
  evidence,
  joined,
)
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import say
from lora_exp.report.statistics.estimates import difference
from lora_exp.report.statistics.fits import parabola
from lora_exp.report.verdicts.tuning import best_by, best_of, contexts, edges, is_tuned
from lora_exp.report.verdicts.verdict import enough, not_worse, tolerance_of


def alpha(group: Group) -> Iterator[Finding]:
  """Whether alpha mattered once the rate was tuned for each."""
  for where, settings in contexts(group, ALPHA)[:MOST_CONTEXTS]:
    levels = list(best_by(settings, ALPHA).values())
    verdict = enough(group, levels, lambda s: s.penalty, ALPHA)
    at = f" ({where})" if where else ""
    worst = max(levels, key=lambda s: s.penalty)
    d = verdict.to_best(worst) or difference(worst.penalties, verdict.best.penalties)
    spread = f"{worst.label} is {d.text(sign=True)} {group.metric.worse_side} {verdict.best.label}"
    if len({s.values.get(RATE) for s in settings}) < 2:
      yield Finding("Alpha", f"Whether alpha matters is not concluded{at}: the rate was the same for each, and a "
                    f"larger alpha acts as a larger rate; sweep optim.lr too. {capital(spread)}.",
                    evidence(verdict), False)
    elif verdict.doubts:
      why = joined(verdict.doubts)
      yield Finding("Alpha", f"Whether alpha matters is not concluded{at}: {why}. {capital(spread)}.",
                    evidence(verdict), False)
    else:
      mattered = not not_worse(d, verdict.tolerance)
      text = f"Alpha {'mattered' if mattered else 'did not matter measurably'} once the rate was tuned for each{at}: "
      yield Finding("Alpha", f"{text}{spread}, the best of the alphas.", evidence(verdict), True,
                    {"mattered": mattered, "where": where})


def rate(group: Group) -> Iterator[Finding]:
  """The best rate of each rank (or of each other setting), on the grid and by a parabola in log lr."""
  key = RANK if RANK in group.keys else "method" if "method" in group.keys else None
  held = [k for k in group.keys if k != RATE and (k == key or not is_tuned(k))]
  groups: dict[tuple, list[Setting]] = {}
  for s in group.adapted:
    if RATE in s.values:
      groups.setdefault(tuple((k, s.values.get(k)) for k in held), []).append(s)
  lines, edge, trials = [], [], []
  for at, settings in groups.items():
    by_rate = best_by(settings, RATE)
    if len(by_rate) < 2:
      continue
    best = best_of(by_rate.values())
    fit = parabola([float(np.log(lr)) for lr in by_rate], [s.penalty for s in by_rate.values()])
    inside = fit is not None and min(by_rate) <= np.exp(fit.place) <= max(by_rate)
    name = ", ".join(say(k, v) for k, v in at if v is not None)
    fitted = f" (fitted {np.exp(fit.place):.2g})" if fit and inside else ""
    lines.append(f"{name + ': ' if name else ''}{best.values[RATE]:g}{fitted}")
    edge += edges(group, best, tolerance_of(settings))
    trials.append(best.names)
  if lines:
    rest = f"; and of {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
    text = f"Best learning rate by held-out {group.metric.label}: {'; '.join(lines[:MOST_LINES])}{rest}."
    yield Finding("Rate", text + (f" Not settled: {joined(list(dict.fromkeys(edge)))}." if edge else ""),
                  f"trials {'; '.join(trials)}", not edge)

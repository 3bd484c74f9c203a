"""Findings: whether alpha matters, and the best learning rate."""

from collections.abc import Iterator, Sequence

import numpy as np

from lora_exp.report.estimation.fits import fit_parabola
from lora_exp.report.findings.finding import (
  FEW_SEEDS,
  MOST_CONTEXTS,
  MOST_LINES,
  Finding,
  confidence,
  evidence,
  in_context,
  joined,
)
from lora_exp.report.findings.phrases import margin_text, more_seeds_sentence, state_sentences
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import ALPHA, METHOD, RANK, RATE
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.tuning import at_edges, best_by, best_of, context_words, contexts, is_tuned, levels_of
from lora_exp.report.verdicts.verdict import Verdict, judge_levels

ALPHA_QUESTION = "Does alpha matter?"


def alpha_effect(group: Group) -> Iterator[Finding]:
  """Whether alpha matters once the rate was tuned for each."""
  for where, settings in contexts(group, ALPHA)[:MOST_CONTEXTS]:
    verdict = judge_levels(group, levels_of(settings, ALPHA), ALPHA)
    doubts = list(verdict.doubts)
    if len({s.values.get(RATE) for s in settings}) < 2:
      doubts.append("the rate was the same for each, and a larger alpha acts as a larger rate; sweep optim.lr too")
    mattered = None if doubts else _mattered(verdict)
    answer = _alpha_answer(verdict, mattered, doubts, where)
    parts = [answer, state_sentences(verdict), more_seeds_sentence(verdict)]
    text = " ".join(part for part in parts if part)
    if verdict.notes:
      text += f" Not tuned alike: {joined(list(verdict.notes.values()))}."
    yield Finding("Alpha", text, evidence(verdict), mattered is not None, {"mattered": mattered, "where": where},
                  ALPHA_QUESTION, answer)


def _mattered(verdict: Verdict) -> bool | None:
  """True if an alpha is insufficient, False if all are sufficient, None otherwise."""
  if verdict.insufficient:
    return True
  return None if verdict.undecided else False


def _alpha_answer(verdict: Verdict, mattered: bool | None, doubts: Sequence[str], where: str) -> str:
  at, margin = in_context(where), margin_text(verdict)
  if mattered is None:
    why = joined(doubts) or f"no difference of {margin} of the best gain is shown or excluded"
    return f"Whether alpha matters is not settled{at}: {why}."
  if mattered:
    return (f"Alpha matters{at}, once the rate was tuned for each: some alphas are shown to be more than {margin} of "
            f"the best gain short (confidence {confidence(verdict)}).")
  return (f"Alpha matters by less than {margin} of the best gain{at}, once the rate was tuned for each (confidence "
          f"{confidence(verdict)}).")


def best_rate(group: Group) -> Iterator[Finding]:
  """The best learning rate for each rank (or other setting): by the mean score, or by the tuning trials."""
  by_name = [(name, settings, best_by(settings, RATE)) for name, settings in _with_rates(group)]
  by_name = [(name, settings, by_rate) for name, settings, by_rate in by_name
             if len(by_rate) > 1 and any(s.seeds for s in by_rate.values())]
  tuned = [(name, by_rate) for name, _, by_rate in by_name if sum(s.seeds > 0 for s in by_rate.values()) == 1]
  scored = [(name, settings, by_rate) for name, settings, by_rate in by_name if (name, by_rate) not in tuned]
  if scored:
    yield _scored_rates(group, scored)
  if tuned:
    best = [best_of(by_rate.values()) for _, by_rate in tuned]
    lines = [f"{name}{s.values[RATE]:g}" for (name, _), s in zip(tuned, best, strict=True)]
    text = (f"Learning rate chosen on the tuning half of the held-out data: {_first_lines(lines)}. No trial scores the "
            "other rates.")
    problems = list(dict.fromkeys(edge for s in best for edge in at_edges(group, s)))
    if problems:
      text += f" Not settled: {joined(problems)}."
    numbers = [", ".join(str(run) for s in by_rate.values() for run in s.runs if run.tunes) for _, by_rate in tuned]
    yield Finding("Rate", text, f"trials {joined(numbers)}", False)


def _scored_rates(group: Group, scored: Sequence[tuple[str, Sequence[Setting], dict[float, Setting]]]) -> Finding:
  """The rates with the best means, and whether the others are shown to be worse."""
  lines, problems, trials, settled, fewest = [], [], [], True, SEEDS_NEEDED
  for name, settings, by_rate in scored:
    best = best_of(by_rate.values())
    verdict = judge_levels(group, levels_of(settings, RATE), RATE)
    others = [level for level in verdict.levels if level.chosen is not best]
    shown = not verdict.doubts and all(level in verdict.insufficient for level in others)
    settled, fewest = settled and shown, min(fewest, best.seeds)
    lines.append(f"{name}{best.values[RATE]:g}{_fitted(by_rate)}{_divergences(by_rate, best)}")
    problems += at_edges(group, best)
    trials.append(", ".join(str(run) for run in best.runs))
  metric = group.metric
  text = f"Learning rate with the {metric.best_word} mean held-out {metric.label}: {_first_lines(lines)}."
  if problems:
    text += f" Not settled: {joined(list(dict.fromkeys(problems)))}."
  elif fewest < SEEDS_NEEDED:
    text += FEW_SEEDS
  elif not settled:
    text += f" Not every other rate is shown to be more than {group.margin * 100:g} % of the gain worse."
  return Finding("Rate", text, f"trials {joined(trials)}", settled and not problems)


def _first_lines(lines: Sequence[str]) -> str:
  """The first MOST_LINES of `lines`, and the number of the others."""
  rest = f"; and of {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
  return f"{joined(lines[:MOST_LINES])}{rest}"


def _divergences(by_rate: dict[float, Setting], best: Setting) -> str:
  """The other rates at which seeds diverged, in words."""
  words = [f"at {rate:g} {len(s.diverged)} of {len(s.diverged) + s.seeds} diverged" for rate, s in by_rate.items()
           if s is not best and s.diverged]
  return f" ({', '.join(words)})" if words else ""


def _with_rates(group: Group) -> list[tuple[str, Sequence[Setting]]]:
  """(name with a colon, settings) that differ in their rate, and in other tuned keys than rank (or else method)."""
  main = RANK if RANK in group.keys else METHOD
  fixed = [k for k in group.keys if k != RATE and (k == main or not is_tuned(k))]
  found: dict[tuple, list[Setting]] = {}
  for setting in group.tried:
    if RATE in setting.values:
      found.setdefault(tuple((k, setting.values.get(k)) for k in fixed), []).append(setting)
  named = [(context_words(values, settings), settings) for values, settings in found.items()]
  return [(f"{name}: " if name else "", settings) for name, settings in named]


def _fitted(by_rate: dict[float, Setting]) -> str:
  """The vertex of the parabola through the best rate and its neighbours, in words; nothing at an edge."""
  steady = {rate: s for rate, s in by_rate.items() if s.seeds and not s.diverged}
  if any(s.seeds < min(SEEDS_NEEDED, max(x.seeds for x in steady.values())) for s in steady.values()):
    return ""  # means over different seeds make no curve
  fit = fit_parabola([float(np.log(lr)) for lr in steady], [s.penalty for s in steady.values()])
  return "" if fit is None else f" (fitted {np.exp(fit.vertex):.2g})"

"""What a study says, in sentences that each name their evidence; or why it says nothing yet."""

from collections.abc import Callable, Iterator

import numpy as np

from lora_exp.report.groups import Setting, Study, say, word
from lora_exp.report.sentences import (
  ALPHA,
  MOST_CONTEXTS,
  MOST_LINES,
  RANK,
  RATE,
  Finding,
  capital,
  evidence,
  joined,
  listed,
  lowest,
)
from lora_exp.report.statistics import difference, parabola
from lora_exp.report.target_findings import targets
from lora_exp.report.trials import TrialRecord
from lora_exp.report.update_findings import used_rank
from lora_exp.report.verdicts import (
  SEEDS_NEEDED,
  best_by,
  best_of,
  contexts,
  edges,
  enough,
  is_tuned,
  not_worse,
  tolerance_of,
  untuned,
)


def findings(study: Study) -> list[Finding]:
  """Every finding of a study, in the order of a reader's questions."""
  parts: list[Callable[[Study], Iterator[Finding]]] = [
    rank, targets, alpha, rate, methods, full, forgetting, used_rank, next_steps]
  if not study.adapted:
    return [Finding("Result", "No adapter finished, so there is nothing to compare.", concluded=False)]
  return [finding for part in parts for finding in part(study)]


def rank(study: Study) -> Iterator[Finding]:
  """The smallest rank that is not measurably worse than the best, each at its own best rate."""
  for where, settings in contexts(study, RANK)[:MOST_CONTEXTS]:
    levels = list(best_by(settings, RANK).values())
    verdict = enough(study, levels, lambda s: s.values[RANK], RANK)
    tried = [s.values[RANK] for s in levels]
    best, chosen = verdict.best.values[RANK], verdict.chosen.values[RANK]
    if chosen == max(tried) and not verdict.doubts:
      verdict.doubts.append(f"the best rank, {chosen}, is the largest with a result and measurably better than the "
                            "others, so a larger one may be better still")
    at = f" ({where})" if where else ""
    tuned = [k for k in study.keys if is_tuned(k) and len({s.values.get(k) for s in settings}) > 1]
    own = f", each at its own best {' and '.join(word(k) for k in tuned)}" if tuned else ""
    facts = {"rank": chosen, "best": best, "where": where}
    if verdict.doubts:
      why = joined(verdict.doubts)
      yield Finding("Rank", f"No smallest sufficient rank is named{at}: {why}. {lowest(verdict.best)}",
                    evidence(verdict), False, facts)
      continue
    text = f"Rank {chosen} is enough{at}: "
    d = verdict.to_best(verdict.chosen)
    if d is None:
      text += f"it has the lowest loss of ranks {listed(tried)}{own}, {verdict.best.loss.text()}."
    else:
      text += (f"of ranks {listed(tried)}{own}, it is the smallest whose held-out loss, "
               f"{verdict.chosen.loss.text()}, is not measurably above that of the best, rank {best} "
               f"({verdict.best.loss.text()}): the difference is {d.text(sign=True)}.")
    below = [(s, verdict.to_best(s)) for s in levels if s.values[RANK] < chosen]
    if below and (d := below[-1][1]):
      text += f" Rank {below[-1][0].values[RANK]} is {d.text(sign=True)} off."
    if chosen == min(tried) and chosen > 1:
      text += " It is the smallest tried: a smaller one may do."
    if verdict.left_out:
      text += f" Left out, with fewer than three seeds: {joined([s.label for s in verdict.left_out])}."
    yield Finding("Rank", text, evidence(verdict), True, facts)


def alpha(study: Study) -> Iterator[Finding]:
  """Whether alpha mattered once the rate was tuned for each."""
  for where, settings in contexts(study, ALPHA)[:MOST_CONTEXTS]:
    levels = list(best_by(settings, ALPHA).values())
    verdict = enough(study, levels, lambda s: s.loss.mean, ALPHA)
    at = f" ({where})" if where else ""
    worst = max(levels, key=lambda s: s.loss.mean)
    d = verdict.to_best(worst) or difference(worst.losses, verdict.best.losses)
    spread = f"{worst.label} is {d.text(sign=True)} above {verdict.best.label}"
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


def rate(study: Study) -> Iterator[Finding]:
  """The best rate of each rank (or of each other setting), on the grid and by a parabola in log lr."""
  key = RANK if RANK in study.keys else "method" if "method" in study.keys else None
  held = [k for k in study.keys if k != RATE and (k == key or not is_tuned(k))]
  groups: dict[tuple, list[Setting]] = {}
  for s in study.adapted:
    if RATE in s.values:
      groups.setdefault(tuple((k, s.values.get(k)) for k in held), []).append(s)
  lines, edge, trials = [], [], []
  for at, settings in groups.items():
    by_rate = best_by(settings, RATE)
    if len(by_rate) < 2:
      continue
    best = best_of(by_rate.values())
    fit = parabola([float(np.log(lr)) for lr in by_rate], [s.loss.mean for s in by_rate.values()])
    inside = fit is not None and min(by_rate) <= np.exp(fit.place) <= max(by_rate)
    name = ", ".join(say(k, v) for k, v in at if v is not None)
    fitted = f" (fitted {np.exp(fit.place):.2g})" if fit and inside else ""
    lines.append(f"{name + ': ' if name else ''}{best.values[RATE]:g}{fitted}")
    edge += edges(study, best, tolerance_of(settings))
    trials.append(best.names)
  if lines:
    rest = f"; and of {len(lines) - MOST_LINES} more" if len(lines) > MOST_LINES else ""
    text = f"Best learning rate by held-out loss: {'; '.join(lines[:MOST_LINES])}{rest}."
    yield Finding("Rate", text + (f" Not settled: {joined(list(dict.fromkeys(edge)))}." if edge else ""),
                  f"trials {'; '.join(trials)}", not edge)


def methods(study: Study) -> Iterator[Finding]:
  """The methods against each other, each at its own best rate."""
  if "method" not in study.keys:
    return
  for where, settings in contexts(study, "method", [RANK])[:MOST_CONTEXTS]:
    levels = list(best_by(settings, "method").values())
    verdict = enough(study, levels, lambda s: s.trainable or 0, "method")
    order = sorted(levels, key=lambda s: s.loss.mean)
    at = f" ({where})" if where else ""
    words = ", ".join(f"{s.label} {s.loss.text()}" for s in order)
    if verdict.doubts:
      yield Finding("Methods", f"No method is named best{at}: {joined(verdict.doubts)}. Losses: {words}.",
                    evidence(verdict), False)
      continue
    ties = [s.label for s, d in verdict.against if not_worse(d, verdict.tolerance)]
    text = f"{verdict.best.label} has the lowest loss{at}"
    text += f"; not measurably worse: {'; '.join(ties)}" if ties else ", measurably below every other"
    yield Finding("Methods", f"{text}. Losses: {words}.", evidence(verdict), True, {"best": verdict.best.method})


def full(study: Study) -> Iterator[Finding]:
  """How much of full fine-tuning's gain the best adapter, and the smallest sufficient one, recover."""
  top = study.full
  if top is None:
    yield Finding("Full fine-tuning", "There is no trial with lora=full, so the share of its gain that adapters recover "
                  "is not known; add one.", concluded=False)
    return
  best = best_of(study.adapted)
  for _, settings in (places if len(places := contexts(study, RANK)) == 1 else ()):
    verdict = enough(study, list(best_by(settings, RANK).values()), lambda s: s.values[RANK], RANK)
    best = best if verdict.doubts else verdict.chosen  # the answer, rather than the last thousandth of a nat
  share = study.share(best)
  if not share.n:
    yield Finding("Full fine-tuning", f"Full fine-tuning ({top.loss.text()}) is not better than the base "
                  f"({study.base or float('nan'):.4f}), so there is no gain to recover.", f"trials {top.names}", False)
    return
  text = f"Of the gain of full fine-tuning, {best.label} recovers {share.text(1, factor=100)} %"
  if best.trainable and top.trainable:
    text += f" with {best.trainable / top.trainable * 100:.3g} % of its parameters"
  text += f": {best.loss.text()} against {top.loss.text()}, from a base of {study.base or float('nan'):.4f}."
  few = min(best.seeds, top.seeds) < SEEDS_NEEDED
  if few:
    text += " One of them has fewer than three seeds."
  if edge := edges(study, top, tolerance_of([top])):
    text += f" {capital(joined(edge))}, so full fine-tuning may do better."
  yield Finding("Full fine-tuning", text, f"trials {best.names} against {top.names}", not few and not edge,
                {"share": share.mean})


def forgetting(study: Study) -> Iterator[Finding]:
  """What the settings lost on `retain`."""
  losses = [(s, s.of(lambda trial: trial.number_at("losses", "forgetting"))) for s in study.settings if s.seeds]
  losses = [(s, e) for s, e in losses if e.n and s.method != "frozen"]
  if len(losses) < 2:
    return
  least, most = min(losses, key=lambda p: p[1].mean), max(losses, key=lambda p: p[1].mean)
  few = min(least[1].n, most[1].n) < SEEDS_NEEDED
  yield Finding("Forgetting", f"The loss on the retained text changed by {least[1].text(sign=True)} ({least[0].label}) "
                f"at the least and by {most[1].text(sign=True)} ({most[0].label}) at the most."
                + (" Fewer than three seeds: no order is concluded." if few else ""),
                f"trials {least[0].names}; {most[0].names}", not few)


def next_steps(study: Study) -> Iterator[Finding]:
  """What to try next."""
  steps = []
  least = min(s.seeds for s in study.adapted)
  if least < SEEDS_NEEDED:
    steps.append(f"run more seeds (train.seed=0,1,2): at least one setting has {least}")
  settings = best_by(study.adapted, RANK).values() if RANK in study.keys and \
    all(RANK in s.values for s in study.adapted) else [best_of(study.adapted)]
  edge = dict.fromkeys(e for s in settings for e in edges(study, s, tolerance_of(study.adapted)))
  steps += [f"extend the grid: {e}" for e in edge]
  ranks = study.levels(RANK)
  if len(ranks) > 1 and all(s.budget is None for s in study.adapted):  # a budget chooses the rank
    top = list(best_by([s for s in study.adapted if RANK in s.values], RANK).values())
    if alike := untuned(study, top, RANK):
      steps.append(f"try more values for each rank (sweep=rank_lr, or a larger study): {joined(alike)}")
    elif len(top) > 1 and best_of(top) is top[-1] and not not_worse(difference(top[-2].losses, top[-1].losses),
                                                                 tolerance_of(top)):
      steps.append(f"try a rank above {top[-1].values[RANK]}: the loss still falls from rank {top[-2].values[RANK]}")
    if RATE not in study.keys:
      steps.append("sweep optim.lr as well (sweep=rank_lr): one rate for every rank favours some of them")
  if study.full is None:
    steps.append("add lora=full for the upper reference line")
  late = [s for s in study.adapted if all(_still_falling(trial) for trial in s.counted.values())]
  if len(late) > len(study.adapted) / 2:
    steps.append("train longer: most settings were at their best at the last step")
  lost = [trial for trial in study.trials if trial.loss is None and trial.status != "pruned"]
  if lost:
    steps.append(f"repeat or leave out what did not finish: trials {', '.join(map(str, lost))}")
  if steps:
    yield Finding("Next", f"{capital('; '.join(steps))}.")


def _still_falling(trial: TrialRecord) -> bool:
  return trial.number_at("losses", "best_step") == trial.number_at("steps")

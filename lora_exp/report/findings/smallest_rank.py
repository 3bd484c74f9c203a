"""Finding: the smallest rank that is enough."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import MOST_CONTEXTS, RANK, Finding, evidence, joined, listed, lowest
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import word
from lora_exp.report.verdicts.tuning import best_by, contexts, is_tuned
from lora_exp.report.verdicts.verdict import enough


def rank(group: Group) -> Iterator[Finding]:
  """The smallest rank that is not measurably worse than the best, each at its own best rate."""
  for where, settings in contexts(group, RANK)[:MOST_CONTEXTS]:
    levels = list(best_by(settings, RANK).values())
    verdict = enough(group, levels, lambda s: s.values[RANK], RANK)
    tried = [s.values[RANK] for s in levels]
    best, chosen = verdict.best.values[RANK], verdict.chosen.values[RANK]
    if chosen == max(tried) and not verdict.doubts:
      verdict.doubts.append(f"the best rank, {chosen}, is the largest with a result and measurably better than the "
                            "others, so a larger one may be better still")
    at = f" ({where})" if where else ""
    tuned = [k for k in group.keys if is_tuned(k) and len({s.values.get(k) for s in settings}) > 1]
    own = f", each at its own best {' and '.join(word(k) for k in tuned)}" if tuned else ""
    facts = {"rank": chosen, "best": best, "where": where}
    if verdict.doubts:
      why = joined(verdict.doubts)
      yield Finding("Rank", f"No smallest sufficient rank is named{at}: {why}. {lowest(verdict.best)}",
                    evidence(verdict), False, facts)
      continue
    metric = group.metric
    text = f"Rank {chosen} is enough{at}: "
    d = verdict.to_best(verdict.chosen)
    if d is None:
      text += (f"it has the {metric.best_word} {metric.label} of ranks {listed(tried)}{own}, "
               f"{verdict.best.score.text()}.")
    else:
      text += (f"of ranks {listed(tried)}{own}, it is the smallest whose held-out {metric.label}, "
               f"{verdict.chosen.score.text()}, is not measurably {metric.worse_side} that of the best, rank {best} "
               f"({verdict.best.score.text()}): the difference is {d.text(sign=True)}.")
    below = [(s, verdict.to_best(s)) for s in levels if s.values[RANK] < chosen]
    if below and (d := below[-1][1]):
      text += f" Rank {below[-1][0].values[RANK]} is {d.text(sign=True)} off."
    if chosen == min(tried) and chosen > 1:
      text += " It is the smallest tried: a smaller one may do."
    if verdict.left_out:
      text += f" Left out, with fewer than three seeds: {joined([s.label for s in verdict.left_out])}."
    yield Finding("Rank", text, evidence(verdict), True, facts)

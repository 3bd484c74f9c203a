"""Finding: the smallest rank that is enough."""

from collections.abc import Iterator, Sequence

from lora_exp.report.findings.finding import MOST_CONTEXTS, Finding, best_sentence, evidence, in_context, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK, short_name
from lora_exp.report.verdicts.tuning import best_by, contexts, is_tuned
from lora_exp.report.verdicts.verdict import Verdict, judge


def smallest_rank(group: Group) -> Iterator[Finding]:
  """The smallest rank that is not measurably worse than the best, each at its own best rate."""
  for where, settings in contexts(group, RANK)[:MOST_CONTEXTS]:
    levels = list(best_by(settings, RANK).values())
    verdict = judge(group, levels, _rank, RANK)
    best, chosen, largest = _rank(verdict.best), _rank(verdict.chosen), _rank(levels[-1])
    doubts = list(verdict.doubts)
    if chosen == largest and not doubts:
      doubts.append(f"the best rank, {chosen}, is the largest with a result and measurably better than the others, so "
                    "a larger one may be better still")
    values = {"rank": chosen, "best": best, "where": where}
    if doubts:
      text = f"No smallest sufficient rank is named{in_context(where)}: {joined(doubts)}. {best_sentence(verdict.best)}"
      yield Finding("Rank", text, evidence(verdict), False, values)
    else:
      text = f"Rank {chosen} is enough{in_context(where)}: {_conclusion(group, settings, levels, verdict)}"
      yield Finding("Rank", text, evidence(verdict), True, values)


def _conclusion(group: Group, settings: Sequence[Setting], levels: Sequence[Setting], verdict: Verdict) -> str:
  """Why the chosen rank is enough. `levels`: the best of `settings` of each rank."""
  tuned = [k for k in group.keys if is_tuned(k) and len({s.values.get(k) for s in settings}) > 1]
  at_best = f", each at its own best {' and '.join(map(short_name, tuned))}" if tuned else ""
  tried = f"ranks {', '.join(str(_rank(s)) for s in levels)}{at_best}"
  best, chosen, metric = verdict.best, verdict.chosen, group.metric
  d = verdict.to_best(chosen)
  if d is None:
    text = f"it has the {metric.best_word} {metric.label} of {tried}, {best.score.text()}."
  else:
    text = (f"of {tried}, it is the smallest whose held-out {metric.label}, {chosen.score.text()}, is not measurably "
            f"{metric.worse_side} that of the best, rank {_rank(best)} ({best.score.text()}): the difference is "
            f"{d.text(sign=True)}.")
  smaller = [s for s in levels if _rank(s) < _rank(chosen)]
  if smaller and (below := verdict.to_best(smaller[-1])) is not None:
    text += f" Rank {_rank(smaller[-1])} is {below.text(sign=True)} off."
  if not smaller and _rank(chosen) > 1:
    text += " It is the smallest tried: a smaller one may do."
  if verdict.left_out:
    text += f" Left out, with fewer than three seeds: {joined([s.label for s in verdict.left_out])}."
  return text


def _rank(setting: Setting) -> int:
  return setting.values[RANK]

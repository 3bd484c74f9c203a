"""Finding: which methods are enough."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import MOST_CONTEXTS, Finding, confidence, evidence, in_context, joined
from lora_exp.report.findings.phrases import margin_text, more_seeds_sentence, state_sentences, tried_sentence
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import METHOD, RANK
from lora_exp.report.verdicts.tuning import contexts, levels_of
from lora_exp.report.verdicts.verdict import Verdict, judge_levels

QUESTION = "Which method is enough?"


def best_method(group: Group) -> Iterator[Finding]:
  """The methods against each other, each at its own best rank and rate."""
  if METHOD not in group.keys:
    return
  for where, settings in contexts(group, METHOD, [RANK])[:MOST_CONTEXTS]:
    verdict = judge_levels(group, levels_of(settings, METHOD), METHOD)
    answer = _answer(verdict, where)
    tried = tried_sentence(group, verdict.levels, "method")
    parts = [answer, state_sentences(verdict), tried, more_seeds_sentence(verdict)]
    text = " ".join(part for part in parts if part)
    if verdict.notes:
      text += f" Not tuned alike: {joined(list(verdict.notes.values()))}."
    concluded = not verdict.doubts and bool(verdict.sufficient or verdict.insufficient)
    values = {
      "best": _only_sufficient(verdict), "where": where,
      "sufficient": [level.value for level in verdict.sufficient],
      "insufficient": [level.value for level in verdict.insufficient],
    }
    yield Finding("Methods", text, evidence(verdict), concluded, values, QUESTION, answer)


def _only_sufficient(verdict: Verdict) -> str | None:
  """The one sufficient method, where every other is insufficient."""
  sufficient, rest = verdict.sufficient, verdict.undecided
  return sufficient[0].value if len(sufficient) == 1 and not rest and not verdict.doubts else None


def _answer(verdict: Verdict, where: str) -> str:
  """One sentence."""
  at, margin = in_context(where), margin_text(verdict)
  if verdict.doubts:
    return f"No method is named best{at}: {joined(verdict.doubts)}."
  if only := _only_sufficient(verdict):
    return (f"{only} is best{at}: every other method is shown to be more than {margin} of the best gain short "
            f"(confidence {confidence(verdict)}).")
  if not verdict.sufficient and not verdict.insufficient:
    return f"Which method is best is not settled{at}: no difference of {margin} of the best gain is shown or excluded."
  if not verdict.undecided and not verdict.insufficient:
    return f"All methods are shown to be within {margin} of the best gain{at} (confidence {confidence(verdict)})."
  names = ", ".join(str(level.value) for level in verdict.sufficient) or "none"
  return f"Methods shown to be within {margin} of the best gain{at} (confidence {confidence(verdict)}): {names}."

"""Finding: the smallest rank that is enough."""

from collections.abc import Iterator, Sequence

from lora_exp.report.findings.finding import (
  MOST_CONTEXTS,
  Finding,
  capital,
  confidence,
  evidence,
  in_context,
  joined,
)
from lora_exp.report.findings.phrases import (
  and_list,
  dropped_sentence,
  least_share,
  margin_text,
  more_seeds_sentence,
  single_run_sentence,
  state_sentences,
  tried_sentence,
)
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import RANK, RATE
from lora_exp.report.verdicts.tuning import Level, contexts, is_tuned_for_each, levels_of
from lora_exp.report.verdicts.verdict import Verdict, judge_levels

QUESTION = "Which rank is enough?"


def smallest_rank(group: Group) -> Iterator[Finding]:
  """The smallest rank that is shown to be sufficient, each at its own best rate."""
  for where, settings in contexts(group, RANK)[:MOST_CONTEXTS]:
    levels = levels_of(settings, RANK)
    if len(levels) > 1:
      yield _finding(group, levels, where)


def _finding(group: Group, levels: list[Level], where: str) -> Finding:
  verdict = judge_levels(group, levels, RANK)
  named = _smallest(verdict)
  doubts = [*verdict.doubts, *_rank_doubts(group, verdict, named)]
  values = {
    "rank": named.value if named and not doubts else None, "best": verdict.best.value, "where": where,
    "sufficient": [level.value for level in verdict.sufficient],
    "insufficient": [level.value for level in verdict.insufficient],
    "undecided": [level.value for level in verdict.undecided],
    "margin": group.margin,
  }
  tried = tried_sentence(group, levels, "rank")
  if dropped := dropped_sentence(group):
    tried += f" {dropped}"
  if named and not doubts:
    answer = (f"Rank {named.value} is enough{in_context(where)}: it is shown to gain at least {least_share(verdict)} "
              f"of what any other rank tried gains (margin {margin_text(verdict)}, confidence {confidence(verdict)}).")
    text = (f"{answer} {_score(group, named)} {state_sentences(verdict)}{_smaller(levels, named)} {tried}"
            f"{_notes(verdict)}")
    return Finding("Rank", text, evidence(verdict), True, values, QUESTION, f"{answer}{_smaller_ranks(verdict, named)}")
  answer = _no_answer(verdict, named, doubts, where)
  if named and _only_smaller_diverged(verdict, named, doubts):
    values["at_most"] = named.value
  parts = [answer, state_sentences(verdict), tried, more_seeds_sentence(verdict), _single_runs(verdict)]
  text = " ".join(part for part in parts if part) + _notes(verdict)
  return Finding("Rank", text, evidence(verdict), False, values, QUESTION, answer)


def _smallest(verdict: Verdict) -> Level | None:
  return next(iter(verdict.sufficient), None)


def _rank_doubts(group: Group, verdict: Verdict, named: Level | None) -> list[str]:
  """Doubts about ranks alone: the largest of them, and rates that were not searched for each."""
  if named is None:
    return []
  doubts = []
  if named is verdict.levels[-1]:
    doubts.append(f"only the largest rank tried, {named.value}, is shown to be sufficient, and a larger one may be "
                  "better still")
  worse = [level.label for level in verdict.insufficient if level.value > named.value]
  if worse and not is_tuned_for_each(verdict.levels, RATE):
    doubts.append(f"larger ranks are worse ({and_list(worse)}) at this rate, which was not tuned for each rank")
  return doubts + [note for key, note in verdict.notes.items() if not is_tuned_for_each(verdict.levels, key)]


def _no_answer(verdict: Verdict, named: Level | None, doubts: Sequence[str], where: str) -> str:
  """Why no rank is named, in one sentence."""
  at = in_context(where)
  if named and _only_smaller_diverged(verdict, named, doubts):
    return (f"At most rank {named.value} is needed{at} (margin {margin_text(verdict)}, confidence "
            f"{confidence(verdict)}); no smaller rank is named, because {joined(doubts)}.")
  if doubts:
    return f"No smallest sufficient rank is named{at}: {joined(doubts)}."
  return (f"No smallest sufficient rank is named{at}: none is shown to gain at least {least_share(verdict)} of what "
          f"every other gains (margin {margin_text(verdict)}).")


def _only_smaller_diverged(verdict: Verdict, named: Level, doubts: Sequence[str]) -> bool:
  """Whether the only doubts are diverged seeds of ranks below `named`."""
  smaller = [level.divergence for level in verdict.levels if level.diverged and level.value < named.value]
  return bool(doubts) and all(doubt in smaller for doubt in doubts)


def _score(group: Group, named: Level) -> str:
  """The metric of the named rank at its chosen values."""
  gain = named.gain.text(group.metric.digits)
  return f"Its held-out {group.metric.label} is {gain} {group.metric.better_side} the base."


def _smaller(levels: Sequence[Level], named: Level) -> str:
  return " It is the smallest tried: a smaller one may be enough." if named is levels[0] and named.value > 1 else ""


def _smaller_ranks(verdict: Verdict, named: Level) -> str:
  """The sentence on smaller ranks: which are shown not to be enough, and which are undecided."""
  parts = []
  for levels, state in ((verdict.insufficient, "not enough"), (verdict.undecided, "undecided")):
    ranks = [str(level.value) for level in levels if level.value < named.value]
    if ranks:
      noun, verb = ("rank", "is") if len(ranks) == 1 else ("ranks", "are")
      parts.append(f"{noun} {and_list(ranks)} {verb} {state}")
  return f" {capital('; '.join(parts))}." if parts else ""


def _notes(verdict: Verdict) -> str:
  return f" Not tuned alike: {joined(list(verdict.notes.values()))}." if verdict.notes else ""


def _single_runs(verdict: Verdict) -> str:
  if any(len(level.gains) > 1 for level in verdict.levels):
    return ""
  sentence = single_run_sentence(verdict.levels)
  return f"{capital(sentence)}." if sentence else ""

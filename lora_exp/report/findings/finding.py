"""A finding, the headline of a report, and the evidence that findings share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.report.verdicts.judgement import ANY, IN_ORDER, LEVEL, ONE
from lora_exp.report.verdicts.tuning import Level
from lora_exp.report.verdicts.verdict import Verdict

MOST_CONTEXTS = 6  # answers to one question; more would be a list
MOST_LINES = 12
FEW_SEEDS = " Fewer than three seeds: no order is concluded."


@dataclass(frozen=True)
class Finding:
  """The answer to one question about a group of settings."""

  topic: str  # Metrics | Rank | Targets | Alpha | Rate | Methods | Full fine-tuning | Forgetting | Used rank | Next
  text: str
  evidence: str = ""
  concluded: bool = True
  values: dict[str, Any] = field(default_factory=dict)  # the answer for programs
  question: str = ""  # that it answers; empty for a finding that cannot be the headline
  answer: str = ""  # in one sentence, with the margin and the confidence if it is concluded


@dataclass(frozen=True)
class Headline:
  """What the page says at its top."""

  question: str
  answer: str  # one sentence
  concluded: bool


def headline(findings: Sequence[Finding]) -> Headline:
  """The question of the sweep and its answer: the first finding with a conclusion, or else the first with an answer.

  Findings come in the order of a reader's questions. Several answers to the first question stand side by side.
  """
  asked = [finding for finding in findings if finding.question]
  if not asked:
    return Headline("What does this sweep show?", findings[0].text if findings else "Nothing was run.", False)
  same = [finding for finding in asked if finding.question == asked[0].question]
  answers = [finding for finding in same if finding.concluded] or same[:1]
  return Headline(asked[0].question, " ".join(finding.answer for finding in answers), answers[0].concluded)


def evidence(verdict: Verdict) -> str:
  """The gains and trials behind a verdict, and its test."""
  incomplete = len({frozenset(level.gains) for level in verdict.levels}) > 1
  rows = "; ".join(f"{level.label}: gain {_gain(verdict, level, incomplete)}{_diverged(level)} "
                   f"(trials {_trials(level)})" for level in verdict.levels)
  if incomplete:
    rows += "; not all have the same seeds, so gains are adjusted for what the seeds have in common"
  variance = "variance pooled over them"
  if not verdict.judgement.pooled:
    variance += ", or that of the pair if it scatters more or less than the rest"
  covers = "seeds and held-out text" if verdict.covers_text else "seeds"
  tuned = any(len(level.candidates) > 1 for level in verdict.levels)
  choice = " Tuned values are chosen without the seed that they are scored on." if tuned else ""
  correction = {IN_ORDER: ", from the best outwards", ANY: ", divided by the number of candidates", ONE: ""}
  return (f"{rows}. Intervals (95 %) cover {covers}.{choice} Test: one-sided at {_level(verdict)} or less against "
          f"every other{correction[verdict.judgement.claims]}, {variance}; insufficient: Holm over all pairs.")


def _level(verdict: Verdict) -> str:
  """The level of the tests, and, for a sweep that adds seeds until it has an answer, the look with this level."""
  level, look = f"{verdict.judgement.level * 100:.2g} %", verdict.look
  if look is None:
    return level
  return f"{level} (that of look {look.count} during the sweep; all looks share {look.of_level * 100:g} %)"


def confidence(verdict: Verdict | None = None) -> str:
  """The confidence of a conclusion over all looks of the sweep, as `95 %`."""
  level = LEVEL if verdict is None or verdict.look is None else verdict.look.of_level
  return f"{(1 - level) * 100:.3g} %"


def _gain(verdict: Verdict, level: Level, adjusted: bool) -> str:
  return f"{verdict.of(level).gain:.4f}" if adjusted else level.gain.text()


def _diverged(level: Level) -> str:
  return f", diverged in {level.diverged} of {len(level.gains)}" if level.diverged else ""


def _trials(level: Level) -> str:
  """The numbers of the runs of the chosen setting."""
  return ", ".join(str(run) for run in level.chosen.runs)


def in_context(where: str) -> str:
  """` (where)`; nothing for an empty context."""
  return f" ({where})" if where else ""


def joined(parts: Sequence[str]) -> str:
  return "; ".join(parts)


def capital(text: str) -> str:
  """`text` with its first letter in upper case."""
  return text[:1].upper() + text[1:]

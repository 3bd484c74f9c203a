"""A finding, and the phrases that findings share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.report.grouping.setting import Setting
from lora_exp.report.statistics.estimates import Difference
from lora_exp.report.verdicts.verdict import TEST, Verdict

MOST_CONTEXTS = 6  # answers to one question; more would be a list
MOST_LINES = 12
FEW_SEEDS = " Fewer than three seeds: no order is concluded."


@dataclass(frozen=True)
class Finding:
  """The answer to one question about a group of settings."""

  topic: str  # Rank | Targets | Alpha | Rate | Methods | Full fine-tuning | Forgetting | Used rank | Next | Result
  text: str
  evidence: str = ""
  concluded: bool = True
  values: dict[str, Any] = field(default_factory=dict)  # the answer for programs


def evidence(verdict: Verdict) -> str:
  """The scores, differences and trials behind a verdict, and its test."""
  best = verdict.best
  others = "; ".join(f"{s.label} {_signed(d)} (trials {s.trial_numbers})" for s, d in verdict.against)
  return (f"best: {best.label}, {best.score.text()} (trials {best.trial_numbers}); {best.metric.worse_side} it: "
          f"{others or 'none'}; tolerance {verdict.tolerance:.4f}. Test: {TEST}.")


def _signed(d: Difference) -> str:
  return f"{d.text(sign=True)}{'' if d.paired else ' unpaired'}"


def best_sentence(best: Setting) -> str:
  """A sentence that names the best setting."""
  return f"The {best.metric.best_word} mean {best.metric.label} is {best.score.text()}, of {best.label}."


def in_context(where: str) -> str:
  """` (where)`; nothing for an empty context."""
  return f" ({where})" if where else ""


def joined(parts: Sequence[str]) -> str:
  return "; ".join(parts)


def capital(text: str) -> str:
  """`text` with its first letter in upper case."""
  return text[:1].upper() + text[1:]

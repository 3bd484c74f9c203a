"""A finding, and the phrases that findings share."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_exp.report.grouping.setting import Setting
from lora_exp.report.statistics.estimates import Difference
from lora_exp.report.verdicts.verdict import TEST, Verdict

MOST_CONTEXTS = 6  # of one question: beyond, the page would be a list
MOST_LINES = 12
RANK, ALPHA, RATE, TARGETS = "lora.rank", "lora.alpha", "optim.lr", "lora.targets"


@dataclass
class Finding:
  """One answer."""

  topic: str  # Rank | Targets | Alpha | Rate | Methods | Full fine-tuning | Forgetting | Used rank | Next
  text: str
  evidence: str = ""
  concluded: bool = True
  facts: dict[str, Any] = field(default_factory=dict)  # the same for programs


def evidence(verdict: Verdict) -> str:
  best = verdict.best
  others = "; ".join(f"{s.label} {_diff(d)} (trials {s.names})" for s, d in verdict.against)
  return (f"best: {best.label}, {best.score.text()} (trials {best.names}); "
          f"{best.metric.worse_side} it: {others or 'none'}; tolerance {verdict.tolerance:.4f}. Test: {TEST}.")


def _diff(d: Difference) -> str:
  return f"{d.text(sign=True)}{'' if d.paired else ' unpaired'}"


def lowest(best: Setting) -> str:
  return f"The {best.metric.best_word} mean {best.metric.label} is {best.score.text()}, of {best.label}."


def listed(values: Sequence[Any]) -> str:
  return ", ".join(map(str, values))


def joined(words: Sequence[str]) -> str:
  return "; ".join(words)


def capital(text: str) -> str:
  return text[:1].upper() + text[1:]

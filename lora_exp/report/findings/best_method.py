"""Finding: which method is the best."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import MOST_CONTEXTS, RANK, Finding, evidence, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.verdicts.tuning import best_by, contexts
from lora_exp.report.verdicts.verdict import enough, not_worse


def methods(group: Group) -> Iterator[Finding]:
  """The methods against each other, each at its own best rate."""
  if "method" not in group.keys:
    return
  for where, settings in contexts(group, "method", [RANK])[:MOST_CONTEXTS]:
    levels = list(best_by(settings, "method").values())
    verdict = enough(group, levels, lambda s: s.trainable or 0, "method")
    order = sorted(levels, key=lambda s: s.penalty)
    at = f" ({where})" if where else ""
    metric = group.metric
    values = "Losses" if metric.name == "loss" else f"Their {metric.label}"
    words = ", ".join(f"{s.label} {s.score.text()}" for s in order)
    if verdict.doubts:
      yield Finding("Methods", f"No method is named best{at}: {joined(verdict.doubts)}. {values}: {words}.",
                    evidence(verdict), False)
      continue
    ties = [s.label for s, d in verdict.against if not_worse(d, verdict.tolerance)]
    text = f"{verdict.best.label} has the {metric.best_word} {metric.label}{at}"
    text += f"; not measurably worse: {'; '.join(ties)}" if ties else f", measurably {metric.better_side} every other"
    yield Finding("Methods", f"{text}. {values}: {words}.", evidence(verdict), True, {"best": verdict.best.method})

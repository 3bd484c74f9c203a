"""Finding: which method is the best."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import MOST_CONTEXTS, Finding, evidence, in_context, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting, penalty
from lora_exp.report.grouping.setting_keys import METHOD, RANK
from lora_exp.report.verdicts.tuning import best_by, contexts
from lora_exp.report.verdicts.verdict import judge, not_worse


def best_method(group: Group) -> Iterator[Finding]:
  """The methods against each other, each at its own best rank and rate."""
  if METHOD not in group.keys:
    return
  for where, settings in contexts(group, METHOD, [RANK])[:MOST_CONTEXTS]:
    levels = list(best_by(settings, METHOD).values())
    verdict = judge(group, levels, _parameters, METHOD)
    at = in_context(where)
    metric = group.metric
    scores = ", ".join(f"{s.label} {s.score.text()}" for s in sorted(levels, key=penalty))
    scores = f"{'Losses' if metric.name == 'loss' else f'Their {metric.label}'}: {scores}"
    if verdict.doubts:
      text = f"No method is named best{at}: {joined(verdict.doubts)}. {scores}."
      yield Finding("Methods", text, evidence(verdict), False)
      continue
    ties = [s.label for s, d in verdict.against if not_worse(d, verdict.tolerance)]
    others = f"; not measurably worse: {joined(ties)}" if ties else f", measurably {metric.better_side} every other"
    yield Finding("Methods", f"{verdict.best.label} has the {metric.best_word} {metric.label}{at}{others}. {scores}.",
                  evidence(verdict), True, {"best": verdict.best.values[METHOD]})


def _parameters(setting: Setting) -> float:
  return setting.trainable or 0

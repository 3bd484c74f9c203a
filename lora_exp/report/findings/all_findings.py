"""Every finding of a group of settings, in the order of a reader's questions."""

from lora_exp.report.findings.alpha_and_rate import alpha_effect, best_rate
from lora_exp.report.findings.best_method import best_method
from lora_exp.report.findings.finding import Finding
from lora_exp.report.findings.metric_agreement import metric_disagreement
from lora_exp.report.findings.next_steps import next_steps
from lora_exp.report.findings.paying_targets import paying_targets
from lora_exp.report.findings.reference_lines import forgetting, share_of_full
from lora_exp.report.findings.smallest_rank import smallest_rank
from lora_exp.report.findings.used_rank import used_rank
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import LearnedUpdates

NO_UPDATES = LearnedUpdates()


def all_findings(group: Group, updates: LearnedUpdates = NO_UPDATES) -> list[Finding]:
  """The findings of a group; `updates` has the learned updates, if they were read."""
  if not group.adapted:
    return [Finding("Result", _nothing(group), concluded=False)]
  return [
    *metric_disagreement(group),
    *smallest_rank(group),
    *paying_targets(group),
    *alpha_effect(group),
    *best_rate(group),
    *best_method(group),
    *share_of_full(group),
    *forgetting(group),
    *used_rank(group, updates),
    *next_steps(group),
  ]


def _nothing(group: Group) -> str:
  """The sentence that says why there is nothing to compare."""
  tuned = sum(run.tunes and run.status == "done" for run in group.runs)
  if tuned:
    return f"Only tuning trials are done ({tuned}). None scores an adapter."
  done = sum(run.status == "done" and not run.tunes for run in group.runs)
  if done:
    metric = group.metric
    asked = f", or run the sweep with eval.metrics=[{metric.name}]" if metric.requested else ""
    return (f"{done} trial{'s are' if done > 1 else ' is'} done, but none has a held-out {metric.label}. Rank them by "
            f"another metric (report.metric=loss){asked}.")
  return "No adapter finished, so there is nothing to compare."

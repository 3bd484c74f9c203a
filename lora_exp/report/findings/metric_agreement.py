"""Finding: where the loss and another metric of the task disagree on the order of settings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lora_exp.config.metrics import METRICS, Metric
from lora_exp.report.estimation.held_out_text import mean_gains_covariance
from lora_exp.report.findings.finding import Finding, confidence
from lora_exp.report.findings.phrases import percent
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.verdicts.judgement import Judgement, judge

FUNCTIONS_OF_LOSS = ("perplexity", "bits_per_byte")  # they order settings as the loss does
MOST_PAIRS = 3


def metric_disagreement(group: Group) -> Iterator[Finding]:
  """Pairs of settings whose order is shown to be one way by the report's metric and the other way by another metric."""
  judged = _judge(group.adapted, group.metric, group.margin)
  for other in _other_metrics(group):
    by_other = _judge(group.adapted, other, group.margin)
    pairs = [(a, b) for a, verdict in judged.verdicts.items() for b in verdict.worse_than
             if b in by_other.verdicts and a in by_other.verdicts[b].worse_than]
    if pairs:
      words = "; ".join(f"{b} is better than {a} by {group.metric.label} and worse by {other.label}"
                        for a, b in pairs[:MOST_PAIRS])
      more = f" (and {len(pairs) - MOST_PAIRS} more pairs)" if len(pairs) > MOST_PAIRS else ""
      text = (f"The {group.metric.label} and the {other.label} disagree on the order, each by more than "
              f"{percent(group.margin)} of the best gain (confidence {confidence()}): {words}{more}. "
              f"report.metric={other.name} ranks by the other.")
      yield Finding("Metrics", text, "the same test by both metrics", True, {"metric": other.name, "pairs": pairs})


def _other_metrics(group: Group) -> list[Metric]:
  """The metrics that the runs have, without those that are functions of the loss."""
  others = [metric for name, metric in METRICS.items() if name not in FUNCTIONS_OF_LOSS and metric != group.metric]
  return [metric for metric in others if any(run.result(metric.name) is not None for run in group.runs)]


def _judge(settings: Sequence[Setting], metric: Metric, margin: float) -> Judgement:
  by_metric = [replace(setting, metric=metric) for setting in settings]
  scored = [setting for setting in by_metric if setting.seeds]
  documents = [[run.documents.get(metric.name) for run in setting.counted.values()] for setting in scored]
  return judge({setting.label: setting.gains for setting in scored}, margin, added=mean_gains_covariance(documents))

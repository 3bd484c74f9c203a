"""Every finding of a group of settings, in the order of a reader's questions."""

from collections.abc import Callable, Iterator

from lora_exp.report.findings.alpha_and_rate import alpha, rate
from lora_exp.report.findings.best_method import methods
from lora_exp.report.findings.finding import Finding
from lora_exp.report.findings.next_steps import next_steps
from lora_exp.report.findings.paying_targets import targets
from lora_exp.report.findings.reference_lines import forgetting, full
from lora_exp.report.findings.smallest_rank import rank
from lora_exp.report.findings.used_rank import used_rank
from lora_exp.report.grouping.group import Group


def findings(group: Group) -> list[Finding]:
  """Every finding of a group, in the order of a reader's questions."""
  parts: list[Callable[[Group], Iterator[Finding]]] = [
    rank, targets, alpha, rate, methods, full, forgetting, used_rank, next_steps]
  if not group.adapted:
    return [Finding("Result", "No adapter finished, so there is nothing to compare.", concluded=False)]
  return [finding for part in parts for finding in part(group)]

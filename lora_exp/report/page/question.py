"""The question that a sweep answers, derived from its varied settings."""

from collections.abc import Sequence

from lora_exp.report.findings.finding import capital
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import ALPHA, METHOD, RANK, RATE, TARGETS, short_name

MOST_KEYS = 4  # maximum number of keys in a generic question
# (key, what is asked), in the order of a reader's interest
QUESTIONS = (
  (RANK, "which rank is enough"),
  (TARGETS, "which modules need an adapter"),
  (METHOD, "which method is best"),
  (ALPHA, "does alpha matter"),
  (RATE, "which learning rate is best"),
)


def question(groups: Sequence[Group]) -> str:
  """The question as a sentence, about the first two varied keys in QUESTIONS, or else about other varied keys."""
  keys = [key for key, _ in QUESTIONS if any(len(group.levels(key)) > 1 for group in groups)]
  asked = [text for key, text in QUESTIONS if key in keys]
  if asked:
    return f"{capital(', and '.join(asked[:2]))}?"
  others = list(dict.fromkeys(short_name(key) for group in groups for key in group.keys if len(group.levels(key)) > 1))
  if others:
    return f"What difference does {' or '.join(others[:MOST_KEYS])} make?"
  return "What did the adapter learn?"

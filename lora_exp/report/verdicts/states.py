"""The verdict on each setting of a group, for the plots."""

from collections.abc import Iterable

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import METHOD, RANK, TARGETS
from lora_exp.report.verdicts.tuning import contexts, levels_of
from lora_exp.report.verdicts.verdict import judge_levels

States = dict[str, str]  # label of a setting -> sufficient | insufficient | undecided
MOST_CONTEXTS = 6


def level_states(group: Group, key: str, ignore: Iterable[str] = ()) -> States:
  """The verdicts on the levels of `key`, by the setting that was chosen for each."""
  states: States = {}
  for _, settings in contexts(group, key, ignore)[:MOST_CONTEXTS]:
    levels = levels_of(settings, key)
    if len(levels) > 1:
      verdict = judge_levels(group, levels, key)
      states |= {level.label: verdict.of(level).state for level in levels}
  return states


def setting_states(group: Group) -> States:
  """The verdicts of the first question that the group answers: on ranks, or else targets, or else methods."""
  for key, ignore in ((RANK, ()), (TARGETS, (RANK,)), (METHOD, (RANK,))):
    if states := level_states(group, key, ignore):
      return states
  return {}

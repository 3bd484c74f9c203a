"""Repeated trials, with the settings and seeds of an earlier one. They are counted once."""

from collections.abc import Iterable

from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting


def repeated_trials(groups: Iterable[Group]) -> list[str]:
  """A sentence for each trial that repeats an earlier one."""
  return [text for group in groups for setting in group.settings for text in _repeated(setting)]


def _repeated(setting: Setting) -> list[str]:
  name, sentences = setting.metric.name, []
  for run in setting.runs:
    score, first = run.result(name), setting.counted.get(run.seeds)
    if score is None or first is None or first is run:
      continue
    other = first.result(name)
    detail = f"the same {setting.metric.label}" if other == score else f"another {setting.metric.label}, {score:.6g}"
    than = "" if other == score or other is None else f" instead of {other:.6g}"
    sentences.append(f"Trial {run} repeats trial {first}: it has the same settings and seeds and {detail}{than}. "
                     f"Trial {first} counts.")
  return sentences

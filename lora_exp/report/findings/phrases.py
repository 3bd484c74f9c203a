"""Sentences that several findings use: the states of levels, further seeds, and comparisons of single runs."""

import math
from collections.abc import Sequence

import numpy as np

from lora_exp.report.estimation.held_out_text import short_interval
from lora_exp.report.findings.finding import capital
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting_keys import RATE, short_name, value_text
from lora_exp.report.verdicts.tuning import Level
from lora_exp.report.verdicts.verdict import Verdict, text_error

MOST_NAMED = 12  # levels in one sentence
MOST_SEEDS = 100  # a larger number of further seeds is not given


def single_run_sentence(levels: Sequence[Level]) -> str:
  """What the held-out text says about single runs: how far each is short of the best; empty without documents."""
  if text_error(levels) is None or len(levels) < 2:
    return ""
  runs = [next(iter(level.chosen.counted.values())) for level in levels]
  metric = levels[0].chosen.metric.name
  gains = [run.documents[metric].base - run.documents[metric].exported for run in runs]
  best = int(np.argmax([gain.sum() for gain in gains]))
  if gains[best].sum() <= 0:
    return ""
  parts = []
  for i, gain in enumerate(gains[:MOST_NAMED]):
    if i != best:
      short, low, high = short_interval(gain, gains[best])
      if not math.isfinite(low + high):  # too few documents gain anything
        return ""
      parts.append(f"{levels[i].label} {percent(short)} ({percent(low)} to {percent(high)})")
  return (f"Of one run each, short of the gain of {levels[best].label}: {listed(parts)}. These 95 % intervals cover "
          "the held-out text (paired bootstrap over documents) and no other seed")


def state_sentences(verdict: Verdict) -> str:
  """Which levels are sufficient, insufficient and undecided, a sentence each; with the margin."""
  parts = []
  if verdict.sufficient:
    bounds = [_bound(verdict, level) for level in verdict.sufficient]
    parts.append(f"Shown to be within {margin_text(verdict)} of the best gain: {listed(bounds[:MOST_NAMED])}.")
  if verdict.insufficient:
    shorts = [f"{level.label} ({percent(verdict.of(level).short)} in the mean)" for level in verdict.insufficient]
    parts.append(f"Shown to be more than {margin_text(verdict)} short of it: {listed(shorts[:MOST_NAMED])}.")
  if verdict.undecided:
    open_levels = [_undecided(verdict, level) for level in verdict.undecided]
    parts.append(f"Undecided: {listed(open_levels[:MOST_NAMED])}.")
  return " ".join(parts)


def _bound(verdict: Verdict, level: Level) -> str:
  """A sufficient level with how much it may be short of the best gain; the best itself is 0 short."""
  at_most = verdict.of(level).at_most
  return f"{level.label} (the best)" if at_most < 5e-4 else f"{level.label} (at most {percent(at_most)} short)"


def _undecided(verdict: Verdict, level: Level) -> str:
  if level.diverged:
    return level.divergence
  at_most = verdict.of(level).at_most
  return f"{level.label} (may be up to {percent(at_most)} short)" if math.isfinite(at_most) else level.label


def more_seeds_sentence(verdict: Verdict) -> str:
  """How many further seeds would probably decide, and how much training they take; empty if that is unknown."""
  needed = [seeds for level in verdict.undecided if (seeds := verdict.of(level).more_seeds)]
  if not needed or verdict.doubts:
    return ""
  seeds = max(needed)
  if seeds > MOST_SEEDS:
    return f"The seeds scatter so much that more than {MOST_SEEDS} more of each would be needed to decide."
  trials = seeds * len(verdict.levels)
  count = f"{seeds} more seed{'s' * (seeds != 1)}"
  return f"About {count} of each would probably decide ({trials} trials{_duration(verdict, trials)})."


def _duration(verdict: Verdict, trials: int) -> str:
  """The time of some more trials, from those that ran."""
  runs = [run for level in verdict.levels for run in level.chosen.counted.values()]
  seconds = [value for run in runs if (value := run.number_at("seconds", "total")) is not None]
  if not seconds:
    return ""
  total = float(np.mean(seconds)) * trials
  hours = f"{total / 3600:.1f} h" if total >= 3600 else f"{max(total / 60, 1):.0f} min"
  return f", about {hours} one after another"


def tried_sentence(group: Group, levels: Sequence[Level], noun: str) -> str:
  """The levels that were compared, and how their rates were chosen."""
  values = ", ".join(str(level.value) for level in levels)
  return f"{capital(noun)}s tried: {values}{_tuning(group, levels, noun)}."


def _tuning(group: Group, levels: Sequence[Level], noun: str) -> str:
  """Such as `, each at its own best rank, all at lr 0.005, which was not tuned for each method`."""
  keys = [key for key in group.keys if any(_varies(level, key) for level in levels)]
  text = f", each at its own best {and_list([short_name(key) for key in keys])}" if keys else ""
  rates = {run.config.get(RATE) for level in levels for setting in level.candidates for run in setting.runs}
  if len(rates) == 1:
    text += f", all at lr {value_text(rates.pop())}, which was not tuned for each {noun}"
  return text


def _varies(level: Level, key: str) -> bool:
  return len({repr(setting.values.get(key)) for setting in level.candidates}) > 1


def least_share(verdict: Verdict) -> str:
  """What a sufficient level gains at least, as a share of any other's gain: `95 %` for a margin of 5 %."""
  return percent(1 - verdict.judgement.margin)


def dropped_sentence(group: Group) -> str:
  """The settings that the sweep dropped during training, with the reasons; empty if there are none."""
  reasons = {s.label: next((run.reason for run in s.runs if run.status == "pruned" and run.reason), "")
             for s in group.dropped}
  if not reasons:
    return ""
  parts = [f"{label} ({reason})" if reason else label for label, reason in reasons.items()]
  return f"Not judged, because the sweep dropped them during training: {'; '.join(parts[:MOST_NAMED])}."


def margin_text(verdict: Verdict) -> str:
  """As `5 %`."""
  return percent(verdict.judgement.margin)


def percent(share: float) -> str:
  """A share as text, such as `5 %` or `1.2 %`."""
  value = share * 100
  return f"{value:.0f} %" if abs(value) >= 10 or abs(value - round(value)) < 1e-9 else f"{value:.1f} %"


def listed(words: Sequence[str]) -> str:
  """Joins words, as in `a, b`, or as in `a, rank 4; b, rank 4` if a word contains a comma."""
  return ("; " if any("," in word for word in words) else ", ").join(words)


def and_list(words: Sequence[str]) -> str:
  """Joins words, as in `a, b and c`."""
  return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

"""Findings: the share of full fine-tuning's gain that adapters recover, and forgetting."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from lora_exp.report.estimation.estimates import Ratio, estimate, ratio
from lora_exp.report.findings.finding import FEW_SEEDS, Finding, capital, confidence, joined
from lora_exp.report.findings.phrases import percent
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.tuning import Level, at_edges, best_of, contexts, levels_of, make_level, uneven_tuning
from lora_exp.report.verdicts.verdict import judge_levels, shown_lower, text_error

FULL_TOPIC = "Full fine-tuning"
FULL = "full"  # the label of its level
QUESTION = "How much of full fine-tuning's gain does an adapter recover?"


def share_of_full(group: Group) -> Iterator[Finding]:
  """How much of full fine-tuning's gain the smallest sufficient adapter recovers, or the best one."""
  full_settings = [s for s in group.settings if s.method.trains_everything]
  if not any(s.seeds for s in full_settings):
    yield Finding(FULL_TOPIC, "There is no trial with lora=full, so the share of its gain that adapters recover is not "
                  "known; add one.", concluded=False)
    return
  full, adapter = make_level(FULL, full_settings), _answer(group)
  share, covers_text = _share(adapter, full)
  trials = f"trials {_trials(adapter)} against {_trials(full)}"
  if share is None:
    base = math.nan if group.base is None else group.base
    if full.diverged or adapter.diverged:
      text = f"The share of full fine-tuning's gain is not settled: {_divergence(adapter, full)}."
    else:
      text = (f"Full fine-tuning ({full.chosen.score.text()}) is not better than the base ({base:.4f}), so there is no "
              "gain to recover.")
    yield Finding(FULL_TOPIC, text, trials, False)
    return
  notes = list(uneven_tuning([adapter, full], group.keys, "").values())
  edges = at_edges(group, full.chosen)
  answer = f"Of the gain of full fine-tuning{_at_its_rates(notes)}, {adapter.label} recovers {_interval(share)}."
  text = answer
  if adapter.chosen.trainable and full.chosen.trainable:
    text += f" It trains {adapter.chosen.trainable / full.chosen.trainable * 100:.3g} % of the parameters."
  text += f" Gain {adapter.gain.text()} against {full.gain.text()}."
  if share.n < SEEDS_NEEDED:
    text += " One of them has fewer than three seeds."
  if notes:
    text += f" Not tuned alike: {joined(notes)}."
  if edges:
    text += f" {capital(joined(edges))}, so full fine-tuning may do better."
  covers = "seeds and held-out text" if covers_text else "seeds"
  evidence = f"{trials}. Fieller's interval (95 %) of the ratio of mean gains; it covers {covers}, of both."
  concluded = share.n >= SEEDS_NEEDED and not edges and math.isfinite(share.high)
  yield Finding(FULL_TOPIC, text, evidence, concluded,
                {"share": share.mean, "low": share.low, "high": share.high}, QUESTION, answer)


def _share(adapter: Level, full: Level) -> tuple[Ratio | None, bool]:
  """The ratio of gains with its interval, and whether that covers the held-out text."""
  text = text_error([adapter, full])
  added = np.diag([adapter.choice_variance, full.choice_variance]) + (0.0 if text is None else text)
  return ratio(adapter.gains, full.gains, added), text is not None


def _interval(share: Ratio) -> str:
  """Such as `98.2 % (95 % interval 96.0 to 100.5 %)`."""
  if share.n < 2:
    return f"{share.mean * 100:.1f} % (one seed: no interval)"
  if not math.isfinite(share.high):
    return f"an unknown share (point estimate {percent(share.mean)}; full's gain may be 0)"
  return f"{share.mean * 100:.1f} % (95 % interval {share.low * 100:.1f} to {share.high * 100:.1f} %)"


def _at_its_rates(notes: list[str]) -> str:
  only = any(note.startswith(FULL) and " only " in note for note in notes)
  return " at its only rate" if only else ""


def _divergence(*levels: Level) -> str:
  return joined([level.divergence for level in levels if level.diverged])


def _trials(level: Level) -> str:
  return ", ".join(str(run) for run in level.chosen.runs)


def _answer(group: Group) -> Level:
  """The smallest sufficient rank if there is one, because it is the report's answer; else the best setting."""
  ranks = contexts(group, RANK)
  if len(ranks) == 1:
    verdict = judge_levels(group, levels_of(ranks[0][1], RANK), RANK)
    if verdict.sufficient and not verdict.doubts:
      return verdict.sufficient[0]
    return verdict.best
  return _best_level(group)


def _best_level(group: Group) -> Level:
  """All adapted settings as one level: the best is chosen and scored on different seeds."""
  best = best_of(group.adapted)
  same = [s for s in group.adapted if {k: v for k, v in s.values.items() if k not in group.keys} ==
          {k: v for k, v in best.values.items() if k not in group.keys}]
  return make_level(best.label, same)


def forgetting(group: Group) -> Iterator[Finding]:
  """The settings whose loss on the retained text rose least and most, and whether they are shown to differ."""
  trained = [s for s in group.settings if s.seeds and not s.diverged and not s.method.trains_nothing]
  rises = sorted(((s, _rises(s)) for s in trained if _rises(s)), key=_mean)
  if len(rises) < 2:
    return
  (least, low), (most, high) = rises[0], rises[-1]
  text = (f"The mean change of the loss on the retained text is {_text(low)} ({least.label}) at the least and "
          f"{_text(high)} ({most.label}) at the most.")
  shown = shown_lower([rise for _, rise in rises])
  if min(len(low), len(high)) < SEEDS_NEEDED:
    text += FEW_SEEDS
  elif (0, len(rises) - 1) in shown:
    text += f" It is shown to be higher with {most.label} than with {least.label} (confidence {confidence()})."
  else:
    text += f" It is not shown to be higher with {most.label} than with {least.label}."
  test = "Intervals (95 %) cover seeds. Test: one-sided, Holm over all pairs of settings."
  yield Finding("Forgetting", text, f"trials {least.trial_numbers}; {most.trial_numbers}. {test}",
                (0, len(rises) - 1) in shown)


def _rises(setting: Setting) -> dict[tuple, float]:
  """Seeds -> rise of the loss on the retained text, for the runs that measured it."""
  return {seeds: run.forgetting for seeds, run in setting.counted.items() if run.forgetting is not None}


def _mean(pair: tuple[Setting, dict[tuple, float]]) -> float:
  return estimate(list(pair[1].values())).mean


def _text(rise: Mapping[tuple, float]) -> str:
  return estimate(list(rise.values())).text(sign=True)

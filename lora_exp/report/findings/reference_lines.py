"""Findings: the share of full fine-tuning's gain that adapters recover, and forgetting."""

import math
from collections.abc import Iterator

from lora_exp.report.findings.finding import FEW_SEEDS, Finding, capital, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.statistics.estimates import Estimate
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, at_edges, best_by, best_of, contexts
from lora_exp.report.verdicts.verdict import judge, tolerance_of

FULL_TOPIC = "Full fine-tuning"


def share_of_full(group: Group) -> Iterator[Finding]:
  """How much of full fine-tuning's gain the smallest sufficient adapter recovers, or the best one."""
  full = group.full
  if full is None:
    yield Finding(FULL_TOPIC, "There is no trial with lora=full, so the share of its gain that adapters recover is not "
                  "known; add one.", concluded=False)
    return
  adapter = _answer(group)
  share = group.share(adapter)
  base = math.nan if group.base is None else group.base
  if not share.n:
    yield Finding(FULL_TOPIC, f"Full fine-tuning ({full.score.text()}) is not better than the base ({base:.4f}), so "
                  "there is no gain to recover.", f"trials {full.trial_numbers}", False)
    return
  text = f"Of the gain of full fine-tuning, {adapter.label} recovers {share.text(1, factor=100)} %"
  if adapter.trainable and full.trainable:
    text += f" with {adapter.trainable / full.trainable * 100:.3g} % of its parameters"
  text += f": {adapter.score.text()} against {full.score.text()}, from a base of {base:.4f}."
  few_seeds = min(adapter.seeds, full.seeds) < SEEDS_NEEDED
  if few_seeds:
    text += " One of them has fewer than three seeds."
  edge = at_edges(group, full, tolerance_of([full]))
  if edge:
    text += f" {capital(joined(edge))}, so full fine-tuning may do better."
  yield Finding(FULL_TOPIC, text, f"trials {adapter.trial_numbers} against {full.trial_numbers}",
                not few_seeds and not edge, {"share": share.mean})


def _answer(group: Group) -> Setting:
  """The smallest sufficient rank where that is concluded, as it is the answer of the report; else the best setting."""
  ranks = contexts(group, RANK)
  if len(ranks) == 1:
    verdict = judge(group, list(best_by(ranks[0][1], RANK).values()), _rank, RANK)
    if not verdict.doubts:
      return verdict.chosen
  return best_of(group.adapted)


def forgetting(group: Group) -> Iterator[Finding]:
  """The settings that lost least and most on the retained text."""
  rises = [(s, s.estimate(_forgetting)) for s in group.settings if s.seeds and not s.method.trains_nothing]
  rises = [(s, rise) for s, rise in rises if rise.n]
  if len(rises) < 2:
    return
  (least, low), (most, high) = min(rises, key=_mean), max(rises, key=_mean)
  few_seeds = min(low.n, high.n) < SEEDS_NEEDED
  text = (f"The loss on the retained text changed by {low.text(sign=True)} ({least.label}) at the least and by "
          f"{high.text(sign=True)} ({most.label}) at the most.")
  if few_seeds:
    text += FEW_SEEDS
  yield Finding("Forgetting", text, f"trials {least.trial_numbers}; {most.trial_numbers}", not few_seeds)


def _forgetting(run: RunRecord) -> float | None:
  return run.number_at("losses", "forgetting")


def _mean(pair: tuple[Setting, Estimate]) -> float:
  return pair[1].mean


def _rank(setting: Setting) -> int:
  return setting.values[RANK]

"""Finding: how much of the rank was used, and whether seeds agree."""

from collections.abc import Iterator, Sequence

from lora_exp.report.findings.finding import FEW_SEEDS, MOST_CONTEXTS, MOST_LINES, Finding, in_context, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import LearnedUpdates
from lora_exp.report.grouping.seed_overlap import SeedOverlap
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.tuning import best_by, contexts
from lora_exp.runtime.spectrum import ENERGY

USED_RANK = "Used rank"  # topic of the finding
PERCENT = f"{ENERGY * 100:g} %"


def used_rank(group: Group, updates: LearnedUpdates) -> Iterator[Finding]:
  """How many directions the updates of the largest rank use, in each context; nothing where no adapter was read."""
  by_rank = [(where, list(best_by(settings, RANK).values())) for where, settings in contexts(group, RANK)]
  learned = {id(s) for s in updates.settings(group)}
  for where, settings in (by_rank or [("", group.adapted)])[:MOST_CONTEXTS]:
    known = [s for s in settings if id(s) in learned and RANK in s.runs[0].config][:MOST_LINES]
    if known:
      yield _finding(updates, known, where, compare=bool(by_rank))


def _finding(updates: LearnedUpdates, settings: Sequence[Setting], where: str, compare: bool) -> Finding:
  """The finding on `settings`; `compare`: they differ in their rank."""
  used = [updates.estimate(s, "effective_rank") for s in settings]
  ranks = [updates.rank(s) for s in settings]
  largest = ranks.index(max(ranks))
  rank, effective, setting = ranks[largest], used[largest], settings[largest]
  directions = updates.estimate(setting, "directions")
  share = f"; {effective.mean / rank * 100:.0f} %" if updates.is_bounded(setting) else ""
  by = "" if compare or len(settings) == 1 else f" by {setting.label}"
  text = (f"{of_rank(updates, setting)}, {effective.text(1)} directions are used on average{by}{in_context(where)} "
          f"(the effective rank of ΔW{share}), and {PERCENT} of its energy lies in {directions.text(1)}.")
  if compare and len(settings) > 1:
    text += (f" At ranks {', '.join(f'{r:g}' for r in ranks)} the effective rank is "
             f"{', '.join(f'{e.mean:.1f}' for e in used)}.")
  overlap = updates.overlap(setting)
  if overlap is not None:
    text += f" {_agreement(overlap)}"
  few_seeds = min(e.n for e in used) < SEEDS_NEEDED
  if few_seeds:
    text += FEW_SEEDS
  trials = joined([s.trial_numbers for s in settings])
  return Finding(USED_RANK, text, f"trials {trials}; means over modules, ± over seeds", not few_seeds,
                 {"rank": rank, "effective_rank": effective.mean, "where": where})


def of_rank(updates: LearnedUpdates, setting: Setting) -> str:
  """`Of rank 8` if no update has more directions than that; otherwise a phrase that says so."""
  rank = f"{updates.rank(setting):g}"
  if updates.is_bounded(setting):
    return f"Of rank {rank}"
  return f"With lora.rank={rank}, which does not bound the rank of ΔW here"


def _agreement(overlap: SeedOverlap) -> str:
  """What two seeds share, in words."""
  outputs, by_chance = _percent(overlap.outputs), _percent(overlap.outputs_random)
  return (f"Two seeds share {outputs} of these on the output side (random: {by_chance}) and "
          f"{_percent(overlap.inputs)} on the input side ({_percent(overlap.inputs_random)}).")


def _percent(share: float) -> str:
  return f"{share * 100:.0f} %"

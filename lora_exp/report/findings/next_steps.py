"""Finding: what to try next."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import Finding, capital, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.grouping.setting_keys import RANK, RATE
from lora_exp.report.verdicts.contrasts import SEEDS_NEEDED
from lora_exp.report.verdicts.tuning import at_edges, best_by, best_of, levels_of, uneven_tuning
from lora_exp.report.verdicts.verdict import is_better_than_each


def next_steps(group: Group) -> Iterator[Finding]:
  """One finding that lists what would settle the open questions."""
  steps = [
    *_more_seeds(group),
    *_wider_grid(group),
    *_other_ranks(group),
    *_reference_line(group),
    *_longer_training(group),
    *_unfinished(group),
  ]
  if steps:
    yield Finding("Next", f"{capital(joined(steps))}.")


def _more_seeds(group: Group) -> Iterator[str]:
  fewest = min(s.seeds for s in group.adapted)
  if fewest < SEEDS_NEEDED:
    yield f"run more seeds (seed=0,1,2): at least one setting has {fewest}"


def _wider_grid(group: Group) -> Iterator[str]:
  """Where a tuned key is best at the edge of what was tried, for each rank or for the best setting."""
  ranked = RANK in group.keys and all(RANK in s.values for s in group.adapted)
  settings = list(best_by(group.adapted, RANK).values()) if ranked else [best_of(group.adapted)]
  for edge in dict.fromkeys(edge for s in settings for edge in at_edges(group, s)):
    yield f"extend the grid: {edge}"


def _other_ranks(group: Group) -> Iterator[str]:
  """Ranks or rates that are missing; nothing where a budget of parameters chose the rank."""
  if len(group.levels(RANK)) < 2 or any(s.budget is not None for s in group.adapted):
    return
  levels = levels_of([s for s in group.adapted if RANK in s.values], RANK)
  best = [level.chosen for level in levels]
  if uneven := uneven_tuning(levels, group.keys, RANK):
    yield f"try equally many values for each rank (sweep=rank): {joined(list(uneven.values()))}"
  elif len(best) > 1 and _still_better(best[-2], best[-1]):
    yield (f"try a rank above {best[-1].values[RANK]}: the {group.metric.label} still "
           f"{'rises' if group.metric.higher_is_better else 'falls'} from rank {best[-2].values[RANK]}")
  if RATE not in group.keys:
    yield "sweep optim.lr as well (sweep=rank): one rate for every rank favours some of them"


def _still_better(smaller: Setting, larger: Setting) -> bool:
  """Whether the larger rank is shown to be better than the smaller."""
  few_seeds = min(smaller.seeds, larger.seeds) < SEEDS_NEEDED or smaller.diverged or larger.diverged
  return not few_seeds and is_better_than_each([smaller.gains, larger.gains])


def _reference_line(group: Group) -> Iterator[str]:
  if group.full is None:
    yield "add lora=full for the upper reference line"


def _longer_training(group: Group) -> Iterator[str]:
  falling = [s for s in group.adapted if _best_at_the_end(s)]
  if len(falling) > len(group.adapted) / 2:
    yield "train longer: most settings were at their best at the last step"


def _best_at_the_end(setting: Setting) -> bool:
  return all(run.number_at("losses", "best_step") == run.number_at("steps") for run in setting.counted.values())


def _unfinished(group: Group) -> Iterator[str]:
  lost = [str(run) for run in group.runs if run.result(group.metric.name) is None and run.status != "pruned"]
  if lost:
    yield f"repeat or leave out the unfinished trials: {', '.join(lost)}"

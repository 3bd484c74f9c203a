"""Finding: what to try next."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import RANK, RATE, Finding, capital, joined
from lora_exp.report.grouping.group import Group
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.report.statistics.estimates import difference
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, best_by, best_of, edges, untuned
from lora_exp.report.verdicts.verdict import not_worse, tolerance_of


def next_steps(group: Group) -> Iterator[Finding]:
  """What to try next."""
  steps = []
  least = min(s.seeds for s in group.adapted)
  if least < SEEDS_NEEDED:
    steps.append(f"run more seeds (train.seed=0,1,2): at least one setting has {least}")
  settings = best_by(group.adapted, RANK).values() if RANK in group.keys and \
    all(RANK in s.values for s in group.adapted) else [best_of(group.adapted)]
  edge = dict.fromkeys(e for s in settings for e in edges(group, s, tolerance_of(group.adapted)))
  steps += [f"extend the grid: {e}" for e in edge]
  ranks = group.levels(RANK)
  if len(ranks) > 1 and all(s.budget is None for s in group.adapted):  # a budget chooses the rank
    top = list(best_by([s for s in group.adapted if RANK in s.values], RANK).values())
    if alike := untuned(group, top, RANK):
      steps.append(f"try more values for each rank (sweep=rank_lr, or a larger group): {joined(alike)}")
    elif len(top) > 1 and best_of(top) is top[-1] and not not_worse(difference(top[-2].penalties, top[-1].penalties),
                                                                 tolerance_of(top)):
      still = f"the {group.metric.label} still {'rises' if group.metric.higher_is_better else 'falls'}"
      steps.append(f"try a rank above {top[-1].values[RANK]}: {still} from rank {top[-2].values[RANK]}")
    if RATE not in group.keys:
      steps.append("sweep optim.lr as well (sweep=rank_lr): one rate for every rank favours some of them")
  if group.full is None:
    steps.append("add lora=full for the upper reference line")
  late = [s for s in group.adapted if all(_still_falling(trial) for trial in s.counted.values())]
  if len(late) > len(group.adapted) / 2:
    steps.append("train longer: most settings were at their best at the last step")
  lost = [trial for trial in group.trials if trial.result(group.metric.name) is None and trial.status != "pruned"]
  if lost:
    steps.append(f"repeat or leave out what did not finish: trials {', '.join(map(str, lost))}")
  if steps:
    yield Finding("Next", f"{capital('; '.join(steps))}.")


def _still_falling(trial: RunRecord) -> bool:
  return trial.number_at("losses", "best_step") == trial.number_at("steps")

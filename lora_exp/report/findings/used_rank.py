"""Finding: how much of the rank was used, and whether seeds agree."""

from collections.abc import Iterator

from lora_exp.report.findings.finding import MOST_CONTEXTS, MOST_LINES, RANK, Finding, joined, listed
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import given, shown
from lora_exp.report.reading.adapter_updates import Overlap
from lora_exp.report.verdicts.tuning import SEEDS_NEEDED, best_by, contexts
from lora_exp.runtime.spectrum import ENERGY

PERCENT = f"{ENERGY * 100:g} %"
USED = "Used rank"  # topic of the finding


def used_rank(group: Group) -> Iterator[Finding]:
  """Whether the ranks were used, and whether seeds agree."""
  groups = [(where, list(best_by(settings, RANK).values())) for where, settings in contexts(group, RANK)]
  for where, settings in (groups or [("", group.adapted)])[:MOST_CONTEXTS]:
    known = [s for s in settings if s in shown(group) and RANK in s.trials[0].config][:MOST_LINES]
    if not known:
      continue
    used = {id(s): s.of(lambda trial: trial.learned_mean("effective_rank")) for s in known}
    top = max(known, key=given)
    e, most = used[id(top)], top.of(lambda trial: trial.learned_mean("directions"))
    at = f" ({where})" if where else ""
    text = (f"Of rank {given(top):g}, {e.text(1)} directions are used on average{at} (the effective rank of ΔW; "
            f"{e.mean / given(top) * 100:.0f} %), and {PERCENT} of its energy lies in {most.text(1)}.")
    if groups and len(known) > 1:
      text += (f" At ranks {listed([f'{given(s):g}' for s in known])} the effective rank is "
               f"{listed([f'{used[id(s)].mean:.1f}' for s in known])}.")
    if top.overlap:
      text += f" {agreement(top.overlap)}"
    few = min(e.n for e in used.values()) < SEEDS_NEEDED
    text += " Fewer than three seeds: no order is concluded." if few else ""
    yield Finding(USED, text, f"trials {joined([s.names for s in known])}; means over modules, ± over seeds",
                  not few, {"rank": given(top), "effective_rank": e.mean, "where": where})


def agreement(o: Overlap) -> str:
  """What two seeds share, in words."""
  part = lambda x: f"{x * 100:.0f} %"
  return (f"Of these, two seeds share {part(o.outputs)} on the side of the outputs (random ones: "
          f"{part(o.outputs_random)}) and {part(o.inputs)} on that of the inputs ({part(o.inputs_random)}).")

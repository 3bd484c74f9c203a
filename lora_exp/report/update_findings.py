"""What the adapters of a study learned: was the rank used, and do seeds find the same directions?"""

from collections.abc import Iterator
from pathlib import Path

from lora_exp.report.groups import Setting, Study
from lora_exp.report.sentences import MOST_CONTEXTS, MOST_LINES, RANK, Finding, joined, listed
from lora_exp.report.trials import TrialRecord
from lora_exp.report.updates import NEED_W, Overlap, Update, learned, one_thread, seeds_overlap, updates
from lora_exp.report.verdicts import SEEDS_NEEDED, best_by, contexts
from lora_exp.runtime import console
from lora_exp.runtime.spectrum import ENERGY

MOST_SEEDS = 4  # whose directions are held against each other, every pair
PERCENT = f"{ENERGY * 100:g} %"
COLUMNS = ("setting", "effective rank", "stable rank", f"{PERCENT} in", "largest", "‖ΔW‖", "outputs shared",
           "inputs shared")
WITH_W = ("‖ΔW‖/‖W‖", "amplification", "intruders")
USED = "Used rank"  # topic of the finding
HEADING = "What the adapters learned"
NOTE = (
  "Of ΔW, what an adapter adds to a kernel, over the modules of a trial and the seeds of a setting. Effective rank: the "
  "exponential of the entropy of its singular values (Roy and Vetterli, 2007); it is the rank if all are equal. Stable "
  "rank: ‖ΔW‖² over the square of the largest one. "
  f"{PERCENT} in: so many directions hold {PERCENT} of ‖ΔW‖²; largest: the share of the first alone. Shared: the "
  "overlap φ of these directions between two seeds (Hu et al., 2021, section 7.2), on the side of the kernel's outputs "
  "and of its inputs, and in brackets that of random ones. A starts at random and B at zero, so outputs are learned, "
  "while inputs may be little more than what was drawn."
)
NOTE_W = (
  "Amplification: how much larger ΔW is in its directions than W was there (ibid., section 7.3). Intruders: of the ten "
  "largest directions of W + ΔW those that none of W's own comes near (a cosine below 0.5; Shuttleworth et al., 2024, "
  "arXiv 2410.21228)."
)


@one_thread
def learn(directory: Path, study: Study) -> None:
  """Reads what the trials of `study` in the sweep `directory` learned into them, and what the seeds of each share."""
  for setting in study.settings:
    kept: list[dict[str, Update]] = []
    drawn = set()  # seeds of A among them: two of the same seed share their inputs from the start
    for trial in setting.trials:
      found = read(directory, trial, study)
      trial.learned = learned(directory / trial.path, found)
      seed = trial.config.get("train.seed")
      if found and trial.loss is not None and seed not in drawn and len(kept) < MOST_SEEDS:
        kept.append(found)
        drawn.add(seed)
    setting.overlap = seeds_overlap(kept)


def read(directory: Path, trial: TrialRecord, study: Study | None = None) -> dict[str, Update]:
  """The updates of a trial; {} of one that left none, or damaged ones, of which `study` is told."""
  try:
    return updates(directory / trial.path, trial)
  except (ValueError, KeyError, TypeError) as error:
    if study is not None:
      study.unread.append(f"trial {trial}: {error}")
    return {}


def shown(study: Study) -> list[Setting]:
  """The settings of which something is known."""
  return [s for s in study.settings if s.of(lambda trial: trial.learned_mean("norm")).n]


def columns(study: Study) -> list[str]:
  """Of the table; what needs W only if it was looked into."""
  known = any(s.of(lambda trial: trial.learned_mean(NEED_W[0])).n for s in shown(study))
  return [*COLUMNS, *(WITH_W if known else ())]


def rows(study: Study) -> list[list[str]]:
  """The table: a row for each setting."""
  wanted = len(columns(study)) - len(COLUMNS)
  return [row(s, NEED_W[:wanted]) for s in shown(study)]


def row(s: Setting, needing_w: tuple[str, ...]) -> list[str]:
  """A setting in the table; intervals where ranks are compared, means elsewhere."""
  of = lambda name: s.of(lambda trial: trial.learned_mean(name))
  short = lambda name: console.cell(float(f"{of(name).mean:.3g}")) if of(name).n else "-"
  both = lambda share, chance: f"{share:.2f} ({chance:.2f})"
  o = s.overlap
  return [s.label, of("effective_rank").text(2), short("stable_rank"), of("directions").text(2),
          f"{of('energy_first').mean * 100:.0f} %", short("norm"), both(o.outputs, o.outputs_random) if o else "-",
          both(o.inputs, o.inputs_random) if o else "-", *map(short, needing_w)]


def used_rank(study: Study) -> Iterator[Finding]:
  """Whether the ranks were used, and whether seeds agree."""
  groups = [(where, list(best_by(settings, RANK).values())) for where, settings in contexts(study, RANK)]
  for where, settings in (groups or [("", study.adapted)])[:MOST_CONTEXTS]:
    known = [s for s in settings if s in shown(study) and RANK in s.trials[0].config][:MOST_LINES]
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


def given(s: Setting) -> float:
  """The rank that a setting's modules had, on average."""
  return s.of(lambda trial: trial.learned_mean("rank")).mean


def agreement(o: Overlap) -> str:
  """What two seeds share, in words."""
  part = lambda x: f"{x * 100:.0f} %"
  return (f"Of these, two seeds share {part(o.outputs)} on the side of the outputs (random ones: "
          f"{part(o.outputs_random)}) and {part(o.inputs)} on that of the inputs ({part(o.inputs_random)}).")

"""The table of what the adapters learned."""

from lora_exp.report.findings.used_rank import PERCENT
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import shown
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.adapter_updates import NEED_W
from lora_exp.runtime import console

COLUMNS = ("setting", "effective rank", "stable rank", f"{PERCENT} in", "largest", "‖ΔW‖", "outputs shared",
           "inputs shared")
WITH_W = ("‖ΔW‖/‖W‖", "amplification", "intruders")
HEADING = "What the adapters learned"
NOTE = (
  "Of ΔW, what an adapter adds to a kernel, over the modules of a trial and the seeds of a setting. Effective rank: "
  "the exponential of the entropy of its singular values (Roy and Vetterli, 2007); it is the rank if all are equal. "
  "Stable rank: ‖ΔW‖² over the square of the largest one. "
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


def columns(group: Group) -> list[str]:
  """Of the table; what needs W only if it was looked into."""
  known = any(s.of(lambda trial: trial.learned_mean(NEED_W[0])).n for s in shown(group))
  return [*COLUMNS, *(WITH_W if known else ())]


def rows(group: Group) -> list[list[str]]:
  """The table: a row for each setting."""
  wanted = len(columns(group)) - len(COLUMNS)
  return [row(s, NEED_W[:wanted]) for s in shown(group)]


def row(s: Setting, needing_w: tuple[str, ...]) -> list[str]:
  """A setting in the table; intervals where ranks are compared, means elsewhere."""
  of = lambda name: s.of(lambda trial: trial.learned_mean(name))
  short = lambda name: console.cell(float(f"{of(name).mean:.3g}")) if of(name).n else "-"
  both = lambda share, chance: f"{share:.2f} ({chance:.2f})"
  o = s.overlap
  return [s.label, of("effective_rank").text(2), short("stable_rank"), of("directions").text(2),
          f"{of('energy_first').mean * 100:.0f} %", short("norm"), both(o.outputs, o.outputs_random) if o else "-",
          both(o.inputs, o.inputs_random) if o else "-", *map(short, needing_w)]


def notes(columns: list[str]) -> list[str]:
  """What the columns of the table mean."""
  return [NOTE, *([NOTE_W] if WITH_W[0] in columns else [])]

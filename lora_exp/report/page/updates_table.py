"""The table of the learned updates of a group."""

from lora_exp.report.findings.used_rank import PERCENT
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.learned_updates import NEED_KERNEL, LearnedUpdates
from lora_exp.report.grouping.setting import Setting
from lora_exp.runtime import console

HEADING = "What the adapters learned"
COLUMNS = ("setting", "effective rank", "stable rank", f"{PERCENT} in", "largest", "‖ΔW‖", "outputs shared",
           "inputs shared")
KERNEL_COLUMNS = ("‖ΔW‖/‖W‖", "amplification", "intruders")  # require task=inspect; in the order of NEED_KERNEL
NOTE = (
  "Statistics of the update ΔW, averaged over the modules of a trial and the seeds of a setting. Effective rank: the "
  "exponential of the entropy of the singular values (Roy and Vetterli, 2007), which is the rank if all are equal. "
  "Stable rank: ‖ΔW‖² divided by the square of the largest singular value. "
  f"{PERCENT} in: the number of directions with {PERCENT} of ‖ΔW‖²; largest: the share of the first direction. "
  "Shared: the overlap φ of these directions between two seeds (Hu et al., 2021, section 7.2), on the output and input "
  "sides of the kernel, with that of random directions in brackets. A is random and B zero at the start, so output "
  "directions are learned, while input directions may be close to the initial ones."
)
KERNEL_NOTE = (
  "Amplification: the size of ΔW relative to that of W in the directions of ΔW (ibid., section 7.3). Intruders: how "
  "many of the ten largest directions of W + ΔW have a cosine below 0.5 to all directions of W (Shuttleworth et al., "
  "2024, arXiv 2410.21228)."
)


def columns(group: Group, updates: LearnedUpdates) -> list[str]:
  """The columns of the table; those that need the kernels only if a run was inspected."""
  return [*COLUMNS, *(KERNEL_COLUMNS if _inspected(group, updates) else ())]


def notes(group: Group, updates: LearnedUpdates) -> list[str]:
  """Explanations of the columns."""
  return [NOTE, *([KERNEL_NOTE] if _inspected(group, updates) else [])]


def rows(group: Group, updates: LearnedUpdates) -> list[list[str]]:
  """A row for each setting that was read."""
  names = NEED_KERNEL if _inspected(group, updates) else ()
  return [_row(setting, updates, names) for setting in updates.settings(group)]


def _inspected(group: Group, updates: LearnedUpdates) -> bool:
  return any(updates.estimate(s, NEED_KERNEL[0]).n for s in updates.settings(group))


def _row(setting: Setting, updates: LearnedUpdates, kernel_names: tuple[str, ...]) -> list[str]:
  """Intervals for the columns that compare ranks, means for the others."""
  overlap = updates.overlap(setting)
  return [
    setting.label,
    updates.estimate(setting, "effective_rank").text(2),
    _mean(setting, updates, "stable_rank"),
    updates.estimate(setting, "directions").text(2),
    f"{updates.estimate(setting, 'energy_first').mean * 100:.0f} %",
    _mean(setting, updates, "norm"),
    f"{overlap.outputs:.2f} ({overlap.outputs_random:.2f})" if overlap else "-",
    f"{overlap.inputs:.2f} ({overlap.inputs_random:.2f})" if overlap else "-",
    *(_mean(setting, updates, name) for name in kernel_names),
  ]


def _mean(setting: Setting, updates: LearnedUpdates, name: str) -> str:
  """The mean with three significant digits; a dash without a value."""
  e = updates.estimate(setting, name)
  return console.cell(float(f"{e.mean:.3g}")) if e.n else "-"

"""The learned updates of a group: their spectra, and the overlap between seeds."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_exp.report.estimation.estimates import Estimate
from lora_exp.report.grouping.group import Group
from lora_exp.report.grouping.seed_overlap import SeedOverlap, seed_overlap
from lora_exp.report.grouping.setting import Setting
from lora_exp.report.reading.adapter_updates import ModuleUpdate, one_thread, read_updates
from lora_exp.report.reading.inspect_file import read_inspection
from lora_exp.report.reading.run_record import RunRecord
from lora_exp.runtime.spectrum import UpdateSpectrum, update_spectrum

MOST_SEEDS = 4  # maximum number of seeds whose directions are compared pairwise
NEED_KERNEL = ("relative_norm", "amplification", "intruders")  # fields of UpdateSpectrum that need task=inspect


@dataclass(frozen=True)
class LearnedUpdates:
  """The spectra and overlaps of a group, by the numbers of its runs."""

  spectra: dict[int, list[UpdateSpectrum]] = field(default_factory=dict)  # one entry per module of a run
  overlaps: dict[int, SeedOverlap] = field(default_factory=dict)  # key: the first run of a setting
  unread: list[str] = field(default_factory=list)  # damaged adapters, one sentence each

  def mean(self, run: RunRecord, name: str) -> float | None:
    """The mean of a field of UpdateSpectrum over the run's modules; None if there is no value."""
    values = [getattr(spectrum, name) for spectrum in self.spectra.get(run.number, ())]
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None

  def estimate(self, setting: Setting, name: str) -> Estimate:
    """The estimate over seeds of `mean`."""

    def value(run: RunRecord) -> float | None:
      return self.mean(run, name)

    return setting.estimate(value)

  def rank(self, setting: Setting) -> float:
    """The configured rank of the setting's modules, on average."""
    return self.estimate(setting, "rank").mean

  def is_bounded(self, setting: Setting) -> bool:
    """Whether no update of the setting has more directions than its configured rank. LoHa's and PiSSA's have more."""
    spectra = [spectrum for run in setting.counted.values() for spectrum in self.spectra.get(run.number, ())]
    return all(sum(value > 0 for value in spectrum.singular_values) <= spectrum.rank for spectrum in spectra)

  def overlap(self, setting: Setting) -> SeedOverlap | None:
    return self.overlaps.get(setting.runs[0].number)

  def settings(self, group: Group) -> list[Setting]:
    """The settings of the group with a spectrum."""
    return [setting for setting in group.settings if self.estimate(setting, "norm").n]


@one_thread
def learn_updates(directory: Path, group: Group) -> LearnedUpdates:
  """Reads the learned updates of the runs of `group` in the sweep `directory`."""
  spectra: dict[int, list[UpdateSpectrum]] = {}
  overlaps: dict[int, SeedOverlap] = {}
  unread: list[str] = []
  for setting in group.settings:
    by_seed: dict[object, dict[str, ModuleUpdate]] = {}  # one run per train.seed, because runs of a seed share A
    for run in setting.runs:
      try:
        updates = read_updates(directory / run.path, run)
      except (ValueError, KeyError, TypeError, OverflowError) as error:
        unread.append(f"trial {run}: {error}")
        updates = {}
      spectra[run.number] = _spectra(directory / run.path, updates)
      if updates and run.result(group.metric.name) is not None and len(by_seed) < MOST_SEEDS:
        by_seed.setdefault(run.config.get("train.seed"), updates)
    if (shared := seed_overlap(list(by_seed.values()))) is not None:
      overlaps[setting.runs[0].number] = shared
  return LearnedUpdates(spectra, overlaps, unread)


def _spectra(run_dir: Path, updates: Mapping[str, ModuleUpdate]) -> list[UpdateSpectrum]:
  """The spectrum of every module with the additions of inspect.json, or that of inspect.json without an adapter."""
  inspected = {spectrum.module: spectrum for spectrum in read_inspection(run_dir)}
  if not updates:
    return list(inspected.values())
  spectra = []
  for path, update in updates.items():
    more = {name: getattr(inspected[path], name) for name in NEED_KERNEL} if path in inspected else {}
    spectra.append(update_spectrum(path, update.rank, update.svd[1], **more))
  return spectra

"""Identifies the sweep and the trial of a run directory from Hydra's files."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_exp.config.errors import InputError
from lora_exp.config.override_grammar import parse
from lora_exp.runtime.run_files import HYDRA, MULTIRUN, OVERRIDES
from lora_exp.runtime.yaml_text import safe_load

SHORT_NAMES = {
  "lora.rank": "r", "lora.targets": "", "seed": "s", "train.seed": "s", "data.seed": "data", "model.seed": "base"
}  # fmt: skip


@dataclass(frozen=True)
class SweepTrial:
  """A trial and its sweep."""

  sweep: Path
  number: str  # the name of its directory
  settings: dict[str, str]  # {setting or group: value}, without those that all trials of the sweep share

  def name(self, method: str) -> str:
    """Number and settings, such as 3-lora-r8-attention-s1."""
    words = []
    for key, value in self.settings.items():
      if key != "lora":
        words.append(SHORT_NAMES.get(key, key.rpartition(".")[2] if "." in key else "") + value)
    return "-".join([self.number, self.settings.get("lora", method), *words])


def sweep_trial(run_dir: Path) -> SweepTrial | None:
  """The trial in `run_dir`; None for a run that is not part of a sweep. Raises InputError if its files are damaged."""
  sweep_file, trial_file = run_dir.parent / MULTIRUN, run_dir / HYDRA / OVERRIDES
  if not (sweep_file.is_file() and trial_file.is_file()):
    return None
  try:
    hydra = safe_load(sweep_file.read_text(encoding="utf-8"))["hydra"]
    params = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    shared = _single_values([*params, *map(str, hydra["overrides"]["task"])])
    trial = _single_values(list(map(str, safe_load(trial_file.read_text(encoding="utf-8")))))
  except (AttributeError, LookupError, TypeError, ValueError, yaml.YAMLError) as error:
    raise InputError(f"{sweep_file} or {trial_file} is damaged ({error}); restore it from a backup") from error
  settings = {key: value for key, value in trial.items() if shared.get(key) != value}
  return SweepTrial(run_dir.parent, run_dir.name, settings)


def _single_values(texts: list[str]) -> dict[str, str]:
  """{setting or group: value} of the overrides with exactly one value."""
  overrides, _ = parse(texts)
  single = [o for o in overrides if not (o.is_delete() or o.is_sweep_override())]
  return {o.get_key_element(): o.get_value_element_as_str().strip("'\"") for o in single}

"""The directories of a sweep's jobs, compared before the first job starts."""

from collections.abc import Iterator, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

DEFAULT = "${hydra.job.num}"


def job_directory_problems(master: DictConfig, jobs: Sequence[Sequence[str]]) -> list[str]:
  """A problem if two jobs of the sweep `master`, given by their overrides, would have the same directory."""
  subdir = str(OmegaConf.to_container(master.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index,call-overload]
  if subdir == DEFAULT or "${hydra.job.num}" in subdir:
    return []
  numbers: dict[str, int] = {}
  for number, directory in enumerate(_directories(master, subdir, jobs)):
    if directory in numbers:
      return [f"hydra.sweep.subdir={subdir}: runs {numbers[directory]} and {number} would both have the directory "
              f"{directory}; add {DEFAULT} to it"]
    numbers[directory] = number
  return []


def _directories(master: DictConfig, subdir: str, jobs: Sequence[Sequence[str]]) -> Iterator[str]:
  """The directory of each job. Ends early at one that is known only when the job runs."""
  parser = OverridesParser.create()
  for texts in jobs:
    cfg = OmegaConf.create(OmegaConf.to_container(master, resolve=False))
    assert isinstance(cfg, DictConfig)
    with open_dict(cfg):
      try:
        for override in parser.parse_overrides(list(texts)):
          OmegaConf.update(cfg, override.key_or_group, override.value(), force_add=True)
        cfg.hydra.job.override_dirname = ",".join(texts)
        yield str(OmegaConf.select(cfg, "hydra.sweep.subdir", throw_on_missing=True))
      except OmegaConfBaseException:
        return

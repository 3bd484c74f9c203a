"""The directories of a sweep's jobs, checked before the first job starts."""

import os
import re
from collections.abc import Sequence

from hydra._internal.config_loader_impl import get_overrides_dirname
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

NUMBER = "${hydra.job.num}"
LISTS = ("grid", "basic", "rounds")  # sweepers whose jobs are all known before the first one starts
HYDRA = re.compile(r"\$\{\s*hydra:\s*")  # the interpolation of a value of the running job, as in ${hydra:job.num}


class JobDirectories:
  """Collects the directories of the jobs of one sweep, and the problems with them."""

  def __init__(self, master: DictConfig):
    self.subdir = str(OmegaConf.to_container(master.hydra.sweep, resolve=False)["subdir"])  # type: ignore[index,call-overload]
    self.jobs_are_known = master.hydra.runtime.choices["hydra/sweeper"] in LISTS
    self.numbers: dict[str, int] = {}
    self.problems: list[str] = []

  def add(self, number: int, cfg: DictConfig, overrides: Sequence[Override]) -> None:
    """Adds the directory of the composed job `number`. At most one problem is found."""
    if HYDRA.sub("${hydra.", self.subdir) == NUMBER or self.problems:
      return
    if cfg.task == "train":
      self.problems = [f"hydra.sweep.subdir={self.subdir}: the runs of a sweep are read from its directories 0, 1, 2, "
                       "…; remove it"]
      return
    try:
      directory = self._resolved(cfg, overrides, number)
      other = directory if self.jobs_are_known else self._resolved(cfg, overrides, number + 1)
    except (OmegaConfBaseException, ValueError) as error:
      message = str(error).splitlines()[0]
      self.problems = [f"hydra.sweep.subdir={self.subdir}: the directory of run {number} is unknown: {message}"]
      return
    first = self.numbers.setdefault(directory, number)
    if os.path.isabs(directory) or directory.split(os.sep)[0] in ("..", "."):
      self.problems = [f"hydra.sweep.subdir={self.subdir}: run {number} would have the directory {directory}, which "
                       "must be inside that of the sweep"]
    elif first != number:
      self.problems = [f"hydra.sweep.subdir={self.subdir}: runs {first} and {number} would both have the directory "
                       f"{directory}; add {NUMBER} to it"]
    elif not self.jobs_are_known and directory == other:
      self.problems = [f"hydra.sweep.subdir={self.subdir}: several runs of the sweep would have the directory "
                       f"{directory}; add {NUMBER} to it"]

  def _resolved(self, cfg: DictConfig, overrides: Sequence[Override], number: int) -> str:
    """The directory of a job, as Hydra's launchers compute it, relative to that of the sweep."""
    node = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    assert isinstance(node, DictConfig)
    names = cfg.hydra.job.config.override_dirname
    with open_dict(node):
      node.hydra.job.id, node.hydra.job.num = str(number), number
      node.hydra.job.override_dirname = get_overrides_dirname(
        list(overrides), list(names.exclude_keys), names.item_sep, names.kv_sep)
      node.hydra.sweep.subdir = HYDRA.sub("${hydra.", self.subdir)
    return os.path.normpath(str(OmegaConf.select(node, "hydra.sweep.subdir", throw_on_missing=True)))

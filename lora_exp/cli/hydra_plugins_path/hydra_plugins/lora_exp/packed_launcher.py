"""`hydra/launcher=packed`: trains the jobs of a sweep in packs; see lora_exp/sweep.

With `packed_joblib`, `packed_ray` and the like, each pack is one job of that launcher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.lora_exp.external_launchers import job_return, plugin_launcher
from omegaconf import DictConfig, OmegaConf, open_dict


class PackedLauncher(Launcher):
  """Passes all jobs at once to the session, which owns the task function."""

  def __init__(self, width: int | None, place: Any):  # the names in hydra.launcher
    self.width, self.place = width, place

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """Stores what Hydra passes before it calls `launch`."""
    self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

  def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
    """Composes every job and trains them in packs."""
    setup_globals()
    state = Singleton.get_state()
    composed = [self._compose(list(texts), initial_job_idx + n) for n, texts in enumerate(job_overrides)]
    Singleton.set_state(state)
    make_launcher = None if self.place is None else self._make_launcher
    outcomes = self.task_function.__self__.launch_packed(composed, self.width, make_launcher)  # type: ignore[attr-defined]
    return [job_return(texts, outcome) for texts, outcome in zip(job_overrides, outcomes, strict=True)]

  def _make_launcher(self, task: TaskFunction) -> Launcher:
    """A launcher that calls `task` for each pack in another process."""
    return plugin_launcher(self.hydra_context, task, self.config, self.place)

  def _compose(self, texts: list[str], number: int) -> tuple[DictConfig, Path]:
    """Composes the config of job `number` and creates its directory, with the overrides saved as Hydra does."""
    cfg = self.hydra_context.config_loader.load_sweep_config(self.config, texts)
    with open_dict(cfg):
      cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
    HydraConfig.instance().set_config(cfg)
    directory = (Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir).absolute()
    hydra = directory / str(cfg.hydra.output_subdir)
    hydra.mkdir(parents=True, exist_ok=True)
    (hydra / "overrides.yaml").write_text(OmegaConf.to_yaml(texts))
    return cfg, directory

"""Hydra's door to lora_exp/sweep/packed.py: `hydra/launcher=packed`, for sweeps that train as one program.

`packed_joblib`, `packed_ray` and the like: each pack is one job of that launcher.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.lora_exp.placed import job_return, placing
from omegaconf import DictConfig, OmegaConf, open_dict


class PackedLauncher(Launcher):
  """Gives all jobs at once to the session, which is the task function's own object."""

  def __init__(self, width: int | None, place: Any):
    self.width, self.place = width, place

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """What Hydra gives before `launch`."""
    self.config, self.hydra_context, self.task_function = config, hydra_context, task_function

  def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
    """Composes every job, and trains them in packs."""
    setup_globals()
    state = Singleton.get_state()
    composed = [self._compose(list(texts), initial_job_idx + n) for n, texts in enumerate(job_overrides)]
    Singleton.set_state(state)
    place = None if self.place is None else self._placing
    outcomes = self.task_function.__self__.launch_packed(composed, self.width, place)  # type: ignore[attr-defined]
    return [job_return(texts, outcome) for texts, outcome in zip(job_overrides, outcomes, strict=True)]

  def _placing(self, task: TaskFunction) -> Launcher:
    """The launcher that has `task` called for each pack elsewhere."""
    return placing(self.hydra_context, task, self.config, self.place)

  def _compose(self, texts: list[str], number: int) -> tuple[DictConfig, Path]:
    cfg = self.hydra_context.config_loader.load_sweep_config(self.config, texts)
    with open_dict(cfg):
      cfg.hydra.job.id, cfg.hydra.job.num = str(number), number
    HydraConfig.instance().set_config(cfg)
    directory = (Path(cfg.hydra.sweep.dir) / cfg.hydra.sweep.subdir).absolute()
    hydra = directory / str(cfg.hydra.output_subdir)
    hydra.mkdir(parents=True, exist_ok=True)
    (hydra / "overrides.yaml").write_text(OmegaConf.to_yaml(texts))
    return cfg, directory

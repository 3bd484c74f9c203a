"""`hydra/sweeper=grid`, the default; see lora_exp/sweep/grid_jobs.py."""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class GridSweeper(Sweeper):
  """Launches the jobs of `params`, `zip` and `extra` at once; the launcher decides how they run."""

  def __init__(self, params: Any, zip: Any, extra: Any, repeat_failed: bool):  # the names in hydra.sweeper
    self.node = {"params": params, "zip": zip, "extra": extra}

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """Stores the arguments that Hydra passes before `sweep`, and creates the launcher."""
    self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
    self.launcher = Plugins.instance().instantiate_launcher(
      hydra_context=hydra_context, task_function=task_function, config=config
    )

  def sweep(self, arguments: list[str]) -> Any:
    """Runs every job; `arguments` are the typed overrides."""
    from lora_exp.sweep.grid_jobs import grid_jobs

    assert self.hydra_context and self.config and self.launcher, "Hydra calls `setup` first"
    parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
    jobs = grid_jobs(self.node, parser.parse_overrides(arguments), parser.parse_overrides)
    directory = Path(self.config.hydra.sweep.dir)
    self.task_function.__self__.require_same_jobs(directory)  # type: ignore[attr-defined]
    directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(self.config, directory / "multirun.yaml")
    self.validate_batch_is_legal(jobs)
    return self.launcher.launch(jobs, initial_job_idx=0)

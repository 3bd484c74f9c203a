"""What the sweepers share: the arguments that Hydra passes, the parser of overrides, and the launch of a batch."""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class LaunchingSweeper(Sweeper):
  """A sweeper that launches batches of jobs. It is abstract: a subclass defines `sweep`."""

  def __init__(self, **node: Any):  # hydra.sweeper
    self.node = node

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """Stores the arguments that Hydra passes before `sweep`, and creates the launcher."""
    self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
    self.launcher = Plugins.instance().instantiate_launcher(
      hydra_context=hydra_context, task_function=task_function, config=config
    )

  @property
  def session(self) -> Any:
    """The session of the command (`lora_exp.cli.session`), whose method runs one job."""
    return self.task_function.__self__  # type: ignore[attr-defined]

  @property
  def directory(self) -> Path:
    """The directory of the sweep."""
    assert self.config is not None, "Hydra calls `setup` first"
    return Path(self.config.hydra.sweep.dir)

  @property
  def parser(self) -> OverridesParser:
    assert self.hydra_context is not None, "Hydra calls `setup` first"
    return OverridesParser.create(config_loader=self.hydra_context.config_loader)

  def launch(self, jobs: list[list[str]], first: int) -> Any:
    """Launches a batch of jobs, numbered from `first`. The first batch writes multirun.yaml."""
    assert self.config is not None and self.launcher is not None, "Hydra calls `setup` first"
    file = self.directory / "multirun.yaml"
    if not file.exists():
      OmegaConf.save(self.config, file)
    self.validate_batch_is_legal(jobs)
    return self.launcher.launch(jobs, initial_job_idx=first)

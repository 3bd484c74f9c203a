"""`hydra/sweeper=study`, which chooses settings from earlier results; see lora_exp/sweep/study_runner.py."""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class StudySweeper(Sweeper):
  """Launches batches of trials, and continues a study that exists already."""

  def __init__(self, **node: Any):  # hydra.sweeper
    self.node = node

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """Stores the arguments that Hydra passes before `sweep`, and creates the launcher."""
    self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
    self.launcher = Plugins.instance().instantiate_launcher(
      hydra_context=hydra_context, task_function=task_function, config=config
    )

  def sweep(self, arguments: list[str]) -> Any:
    """Runs the study and sets the session's outcomes to those of its trials; `arguments` are the typed overrides."""
    from lora_exp.sweep import study_runner
    from lora_exp.sweep.study_settings import read_study

    assert self.hydra_context and self.config and self.launcher, "Hydra calls `setup` first"
    parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
    study = read_study(self.node, parser.parse_overrides(arguments), parser.parse_overrides)
    directory = Path(self.config.hydra.sweep.dir).absolute()
    session = self.task_function.__self__  # type: ignore[attr-defined]
    session.outcomes = study_runner.run(study, directory, self._launch, lambda: session.stopped)

  def _launch(self, jobs: list[list[str]], first: int) -> Any:
    """Launches one batch of jobs, numbered from `first`."""
    assert self.config and self.launcher
    file = Path(self.config.hydra.sweep.dir) / "multirun.yaml"
    if not file.exists():
      OmegaConf.save(self.config, file)
    self.validate_batch_is_legal(jobs)
    return self.launcher.launch(jobs, initial_job_idx=first)

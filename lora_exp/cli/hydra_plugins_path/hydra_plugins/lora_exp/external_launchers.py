"""`hydra/launcher=joblib|ray|submitit_slurm|submitit_local`: each job in a separate process or on another machine."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class ExternalLauncher(Launcher):
  """Runs the jobs with the launcher of another plugin; the session collects their outcomes."""

  def __init__(self, **settings: Any):
    pass  # they are read from the config by `plugin_launcher`

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """Stores what Hydra passes before it calls `launch`."""
    self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

  def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
    """Runs each job in a separate process."""
    assert self.hydra_context and self.config is not None, "Hydra calls `setup` first"
    launcher = plugin_launcher(self.hydra_context, self.task_function, self.config, self.config.hydra.launcher)
    session = self.task_function.__self__  # type: ignore[attr-defined]
    outcomes = session.launch_placed(launcher, job_overrides, initial_job_idx, Path(self.config.hydra.sweep.dir))
    return [job_return(texts, outcome) for texts, outcome in zip(job_overrides, outcomes, strict=True)]


def job_return(texts: Sequence[str], outcome: Any) -> JobReturn:
  """Converts the `outcome` of a job to Hydra's result."""
  result = JobReturn(overrides=texts, task_name="lora_exp", status=JobStatus.COMPLETED)
  result.return_value = outcome
  return result


class Joblib(ExternalLauncher):
  """`hydra/launcher=joblib`."""


class Ray(ExternalLauncher):
  """`hydra/launcher=ray`."""


class Slurm(ExternalLauncher):
  """`hydra/launcher=submitit_slurm`."""


class Local(ExternalLauncher):
  """`hydra/launcher=submitit_local`."""


def plugin_launcher(context: HydraContext, task: TaskFunction, config: DictConfig, node: DictConfig) -> Launcher:
  """The plugin's launcher for the settings `node`, set up to call `task`."""
  from lora_exp.sweep.remote.launcher_plugins import PLUGINS

  config = copy.deepcopy(config)
  config.hydra.launcher = copy.deepcopy(node)
  config.hydra.launcher._target_ = PLUGINS[node._target_.rpartition(".")[2]][0]
  return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)

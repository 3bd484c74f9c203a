"""Hydra's door to lora_exp/sweep/place.py: `hydra/launcher=joblib|ray|submitit_slurm|submitit_local`."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class PlacedLauncher(Launcher):
  """Has a plugin's launcher, with the same settings, run the jobs; the session is told how each ended."""

  def __init__(self, **settings: Any):
    pass

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """What Hydra gives before `launch`."""
    self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

  def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
    """Runs the jobs, each in a process of its own."""
    assert self.hydra_context and self.config is not None, "Hydra calls `setup` first"
    launcher = placing(self.hydra_context, self.task_function, self.config, self.config.hydra.launcher)
    session = self.task_function.__self__  # type: ignore[attr-defined]
    outcomes = session.launch_placed(launcher, job_overrides, initial_job_idx, Path(self.config.hydra.sweep.dir))
    return [job_return(texts, outcome) for texts, outcome in zip(job_overrides, outcomes, strict=True)]


def job_return(texts: Sequence[str], outcome: Any) -> JobReturn:
  """What Hydra gets of a job that ended in `outcome`."""
  done = JobReturn(overrides=texts, task_name="lora_exp", status=JobStatus.COMPLETED)
  done.return_value = outcome
  return done


class Joblib(PlacedLauncher):
  """`hydra/launcher=joblib`."""


class Ray(PlacedLauncher):
  """`hydra/launcher=ray`."""


class Slurm(PlacedLauncher):
  """`hydra/launcher=submitit_slurm`."""


class Local(PlacedLauncher):
  """`hydra/launcher=submitit_local`."""


def placing(context: HydraContext, task: TaskFunction, config: DictConfig, node: DictConfig) -> Launcher:
  """The plugin's own launcher for `node`, set up to call `task`."""
  from lora_exp.sweep.launcher_plugins import PLUGINS

  config = copy.deepcopy(config)
  config.hydra.launcher = copy.deepcopy(node)
  config.hydra.launcher._target_ = PLUGINS[node._target_.rpartition(".")[2]][0]
  return Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=config)

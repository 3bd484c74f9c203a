"""`hydra/sweeper=rounds`, which tunes each setting before it is scored; see lora_exp/sweep/round_runner.py."""

from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class RoundsSweeper(Sweeper):
  """Launches round after round, and continues a sweep that exists already."""

  def __init__(self, **node: Any):  # hydra.sweeper
    self.node = node

  def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
    """Stores what Hydra passes before it calls `sweep`, and makes the launcher."""
    self.config, self.hydra_context, self.task_function = config, hydra_context, task_function
    self.launcher = Plugins.instance().instantiate_launcher(
      hydra_context=hydra_context, task_function=task_function, config=config
    )

  def sweep(self, arguments: list[str]) -> None:
    """Trains the rounds; `arguments` are the overrides that were typed. Sets the session's outcomes to the runs'."""
    from lora_exp.config.metrics import METRICS
    from lora_exp.sweep.round_settings import read_rounds

    assert self.hydra_context and self.config and self.launcher, "Hydra calls `setup` first"
    parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
    plan = read_rounds(self.node, parser.parse_overrides(arguments), parser.parse_overrides)
    directory = Path(self.config.hydra.sweep.dir).absolute()
    if self.config.task != "train":  # nothing is tuned
      self._launch(plan.grid, 0)
      return
    from lora_exp.report.verdicts.judgement import MARGIN
    from lora_exp.sweep.round_runner import train_rounds

    session = self.task_function.__self__  # type: ignore[attr-defined]
    settings = [setting.overrides for setting in plan.settings]
    metric = METRICS[self.config.report.metric or "loss"]
    margin = OmegaConf.select(self.config, "report.margin", default=MARGIN)
    session.outcomes = train_rounds(
      plan, lambda: [self._default(texts, plan.tuning) for texts in settings], metric,
      margin, directory, self._launch, lambda: session.stopped,
    )  # fmt: skip

  def _default(self, texts: list[str], tuning: Any) -> float | None:
    """The value of the tuned setting with these overrides; None without tuning."""
    assert self.hydra_context and self.config is not None
    if tuning is None:
      return None
    composed = self.hydra_context.config_loader.load_sweep_config(self.config, texts)
    value: float = OmegaConf.select(composed, tuning.setting)
    return value

  def _launch(self, jobs: list[list[str]], first: int) -> object:
    """Launches one round of jobs, numbered from `first`."""
    assert self.config and self.launcher
    file = Path(self.config.hydra.sweep.dir) / "multirun.yaml"
    if not file.exists():
      OmegaConf.save(self.config, file)
    self.validate_batch_is_legal(jobs)
    return self.launcher.launch(jobs, initial_job_idx=first)

"""`hydra/sweeper=rounds`, which tunes each setting before it is scored; see lora_exp/sweep/rounds/round_runner.py."""

from typing import TYPE_CHECKING

from hydra_plugins.lora_exp.launching_sweeper import LaunchingSweeper
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
  from lora_exp.sweep.rounds.round_plan import RoundPlan


class RoundsSweeper(LaunchingSweeper):
  """Launches round after round, and continues a sweep that exists already."""

  def sweep(self, arguments: list[str]) -> None:
    """Trains the rounds and sets the session's outcomes to those of the runs; `arguments` are the typed overrides."""
    from lora_exp.sweep.rounds.round_settings import read_rounds

    assert self.config is not None, "Hydra calls `setup` first"
    parse = self.parser.parse_overrides
    plan = read_rounds(self.node, parse(arguments), parse)
    if self.config.task != "train":  # nothing is tuned
      self.launch(plan.grid, 0)
      return
    from lora_exp.config.metrics import METRICS
    from lora_exp.sweep.config_snapshot import read_files_once
    from lora_exp.sweep.packs.launched_runs import LaunchedRuns
    from lora_exp.sweep.rounds.round_runner import RoundRunner

    assert self.hydra_context is not None, "Hydra calls `setup` first"
    read_files_once(self.hydra_context.config_loader)  # later rounds use the same configs as the first
    session, report = self.session, self.config.report
    runs = LaunchedRuns(self.directory.absolute(), self.launch, lambda: session.stopped)
    runner = RoundRunner(plan, self._defaults(plan), METRICS[report.metric or "loss"], report.margin, runs)
    session.require_same_runs({n: self._compose(texts) for n, texts in runner.examples().items()}, runs.directory)
    session.outcomes = runner.train()

  def _compose(self, overrides: list[str]) -> DictConfig:
    """The config of one run."""
    assert self.hydra_context is not None and self.config is not None, "Hydra calls `setup` first"
    return self.hydra_context.config_loader.load_sweep_config(self.config, overrides)

  def _defaults(self, plan: "RoundPlan") -> list[float | None]:
    """The default of the tuned setting in each setting of the sweep; None without tuning."""
    composed = [self._compose(setting.overrides) for setting in plan.settings]
    tuned = None if plan.tuning is None else plan.tuning.setting
    return [None if tuned is None else OmegaConf.select(config, tuned) for config in composed]

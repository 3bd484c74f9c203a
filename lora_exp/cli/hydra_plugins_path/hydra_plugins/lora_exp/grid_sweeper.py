"""`hydra/sweeper=grid`, the default; see lora_exp/sweep/packs/grid_jobs.py."""

from typing import Any

from hydra_plugins.lora_exp.launching_sweeper import LaunchingSweeper
from omegaconf import OmegaConf


class GridSweeper(LaunchingSweeper):
  """Launches the jobs of `params`, `zip` and `extra` at once; the launcher decides how they run."""

  def sweep(self, arguments: list[str]) -> Any:
    """Runs every job; `arguments` are the typed overrides."""
    from lora_exp.sweep.packs.grid_jobs import grid_jobs

    parse = self.parser.parse_overrides
    node = {key: self.node[key] for key in ("params", "zip", "extra")}
    jobs = grid_jobs(node, parse(arguments), parse)
    self.session.require_same_jobs(self.directory)
    self.directory.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(self.config, self.directory / "multirun.yaml")
    return self.launch(jobs, 0)

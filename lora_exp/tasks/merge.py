"""`task=merge`: merges the update of a run into the model's kernels and checks the result (`format=merged`)."""

from lora_exp.config import Config
from lora_exp.config.checks import export_directory
from lora_exp.runtime.device import start_jax
from lora_exp.train.serving.exports import export_merged


def run(cfg: Config) -> None:
  """Writes the merged model of `cfg.run`. Raises LoraExpError if its predictions differ from the run's."""
  start_jax(cfg.cache)
  export_merged(cfg, export_directory(cfg))

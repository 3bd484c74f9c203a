"""`task=merge`: the model with the update of a run in its kernels, checked against the run (`format=merged`)."""

from lora_exp.config import Config
from lora_exp.config.checks import export_directory
from lora_exp.runtime.mesh import keep_programs
from lora_exp.train.exports import export_merged


def run(cfg: Config) -> None:
  """Writes the merged model of `cfg.run`. Raises LoraExpError if it does not predict what the run does."""
  keep_programs(cfg.cache)
  export_merged(cfg, export_directory(cfg))

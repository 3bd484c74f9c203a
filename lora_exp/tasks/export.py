"""`task=export`: writes a trained run as files for other programs (`format=peft|merged|base`)."""

from lora_exp.config import Config
from lora_exp.config.checks import export_directory
from lora_exp.runtime.device import start_jax
from lora_exp.train.exports import export_adapter, export_base, export_merged

FORMATS = {"peft": export_adapter, "merged": export_merged, "base": export_base}


def run(cfg: Config) -> None:
  """Writes the run `cfg.run` in the format `cfg.format`; removes the output if that fails."""
  start_jax(cfg.cache)
  FORMATS[cfg.format](cfg, export_directory(cfg))

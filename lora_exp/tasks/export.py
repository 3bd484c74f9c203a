"""`task=export`: writes a trained run as files for other programs (`format=peft|gguf|mlx|merged|…`)."""

from lora_exp.config import Config
from lora_exp.config.checks import export_directory
from lora_exp.runtime.device import start_jax
from lora_exp.train.serving import exports
from lora_exp.train.serving.hub_upload import upload

FORMATS = {
  "peft": exports.export_adapter,
  "gguf": exports.export_gguf,
  "mlx": exports.export_mlx,
  "merged": exports.export_merged,
  "gguf_merged": exports.export_gguf_merged,
  "base": exports.export_base,
  "gguf_base": exports.export_gguf_base,
}


def run(cfg: Config) -> None:
  """Writes the run `cfg.run` in the format `cfg.format`; removes the output if that fails. `cfg.push` uploads it."""
  start_jax(cfg.cache)
  out = export_directory(cfg)
  FORMATS[cfg.format](cfg, out)
  if cfg.push is not None:
    upload(out, cfg.push)

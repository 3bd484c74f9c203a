"""The first stage of checks: everything that can be refused before a directory is created or a model is built."""

from lora_exp.cli.file_checks import file_problems
from lora_exp.config.checks import check
from lora_exp.config.schema import Config
from lora_exp.data.checks import source_problems
from lora_exp.models.registry import model_problems


def all_problems(cfg: Config) -> list[str]:
  """Every problem of a config, one line each: values first, then families, sources, files and packages."""
  return [*check(cfg), *model_problems(cfg.model), *source_problems(cfg), *file_problems(cfg)]

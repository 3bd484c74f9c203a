"""The first stage of checks: everything that can be checked before a directory is created or a model is built."""

import pkgutil
from collections.abc import Iterator

from lora_exp.cli.file_checks import file_problems
from lora_exp.config.allowed_values import choice_problem
from lora_exp.config.checks import check
from lora_exp.config.schema import INITS, Config
from lora_exp.data.source_checks import source_problems
from lora_exp.lora.method_checks import method_problems
from lora_exp.lora.method_files import method_names
from lora_exp.models.registry import model_problems
from lora_exp.train import loggers
from lora_exp.train.costs.device_kinds import KINDS

TASKS_WITHOUT_JAX = ("report", "dashboard", "list", "compare", "clean")  # they only read files


def all_problems(cfg: Config) -> list[str]:
  """Returns every problem of a config, one line each: values first, then families, sources, files and packages.

  Checks that need the method run last, and only if there is no other problem, because some methods import jax.
  """
  problems = [
    *check(cfg), *_method_name_problems(cfg), *_logger_name_problems(cfg), *_kind_problems(cfg),
    *model_problems(cfg.model), *source_problems(cfg), *file_problems(cfg),
  ]  # fmt: skip
  return problems if problems or cfg.task in TASKS_WITHOUT_JAX else method_problems(cfg)


def logger_names() -> list[str]:
  """The names of the files in `lora_exp/train/loggers`, which are called NAME_logger.py."""
  return sorted(module.name.removesuffix("_logger") for module in pkgutil.iter_modules(loggers.__path__))


def _logger_name_problems(cfg: Config) -> Iterator[str]:
  names = [*logger_names(), "none"]
  for name in cfg.logger.names:
    if name not in names:
      yield f"{choice_problem('logger.name', name, names)}; a list of several: logger.name=[wandb,tensorboard]"


def _kind_problems(cfg: Config) -> Iterator[str]:
  if cfg.plan.kind is not None and cfg.plan.kind not in KINDS:
    yield choice_problem("plan.kind", cfg.plan.kind, [*KINDS])


def _method_name_problems(cfg: Config) -> Iterator[str]:
  names = method_names()
  if cfg.lora.method not in names:
    yield choice_problem("lora.method", cfg.lora.method, names)
  if cfg.lora.init not in (*INITS, *names):
    from lora_exp.lora import methods

    starts = [method.name for method in methods.every() if method.init_of is not None]
    yield choice_problem("lora.init", cfg.lora.init, [*INITS, *starts])

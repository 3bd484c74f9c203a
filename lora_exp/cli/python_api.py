"""The Python API: `compose` a config, `run` it, `load` the trained model of a run.

    import lora_exp

    result = lora_exp.run(["model=minigpt_tiny", "lora.rank=4", "logger=none"])
    print(result.directory, result.summary["losses"], len(result.metrics))
    logits = result.model(tokens_BT)
    trained = lora_exp.load(result.directory)

Errors that a user can cause are raised as `LoraExpError` and are not printed.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.cli.all_checks import all_problems
from lora_exp.cli.claim import claim_directory
from lora_exp.cli.command_line import CommandLine, check_command_line
from lora_exp.cli.paths import with_absolute_paths
from lora_exp.cli.tasks import run_task
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config
from lora_exp.runtime.console import show_warning
from lora_exp.runtime.run_files import (
  ADAPTER,
  CHECKPOINTS,
  CONFIG,
  HELD_OUT_FILE,
  METRICS_FILE,
  SAMPLES,
  SUMMARY,
)
from lora_exp.runtime.saved_config import load_config

if TYPE_CHECKING:
  from lora_exp.lora import Adapter
  from lora_exp.models.modules.language_model import LanguageModel
  from lora_exp.train.loaded_run import LoadedRun

RUN_FILES = {"config": CONFIG, "metrics": METRICS_FILE, "held_out": HELD_OUT_FILE, "summary": SUMMARY,
             "samples": SAMPLES, "adapter": ADAPTER, "checkpoints": CHECKPOINTS}  # fmt: skip


@dataclass(frozen=True)
class Result:
  """The result of a training run. Metrics, model and adapter are read from its files when they are first used."""

  directory: Path  # the run directory
  summary: dict[str, Any]  # its summary.json

  @property
  def paths(self) -> dict[str, Path]:
    """The files of the run that exist: config, metrics, held_out, summary, samples, adapter, checkpoints."""
    paths = {name: self.directory / file for name, file in RUN_FILES.items()}
    return {name: path for name, path in paths.items() if path.exists()}

  @cached_property
  def metrics(self) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: step, tokens, split (train, eval or retain), loss, …"""
    lines = (self.directory / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]

  @cached_property
  def loaded(self) -> "LoadedRun":
    """The base and the trained adapter, as `load` returns them."""
    return load(self.directory)

  @property
  def model(self) -> "LanguageModel":
    """The base with its trained adapter: an NNX module that maps token ids (B, T) to logits (B, T, V)."""
    return self.loaded.model()

  @property
  def adapter(self) -> "Adapter":
    """The trained adapter, for the functions of `lora_exp.lora`."""
    return self.loaded.adapter()


def compose(overrides: Sequence[str] = ()) -> Config:
  """Returns the checked config of one run from command-line overrides.

  Raises InputError with every problem, and for overrides that describe a sweep.
  """
  return _single_line(overrides).jobs[0]


def _single_line(overrides: Sequence[str]) -> CommandLine:
  """The checked command line of one run. Raises InputError for a sweep and for flags."""
  line = check_command_line(overrides)
  if line.multirun:
    raise InputError("several runs: a sweep is started on the command line, or with one `run` for each trial")
  if line.shows_only:
    raise InputError("flags such as --help are only for the command line; give overrides such as lora.rank=4")
  for warning in line.warnings:
    show_warning(warning)
  return line


def run(config: Config | Sequence[str], directory: str | Path | None = None) -> Any:
  """Runs the task of a config, or of overrides.

  Training creates `directory` (default: hydra.run.dir in the overrides, else outputs/DAY/TIME-NAME) or continues in
  `train.resume`, and returns a `Result`. Other tasks return their own result. Raises LoraExpError with the message of
  the command line.
  """
  if isinstance(config, Config):
    config = with_absolute_paths(config)
    if problems := all_problems(config):
      raise InputError(problems)
  else:
    line = _single_line(config)
    config = line.jobs[0]
    if line.typed_directory:
      if directory is not None:
        raise InputError(f"hydra.run.dir={line.directory}: directory={directory} is given as well; remove one of them")
      directory = line.directory
  if config.distributed.coordinator is not None:
    raise InputError("distributed.coordinator: several processes are started on the command line; remove it")
  if config.task != "train":
    return run_task(config, Path())
  if config.train.resume:
    run_dir = Path(config.train.resume)
    run_task(config, run_dir)
  else:
    run_dir = _train_in_new_directory(config, directory)
  return Result(run_dir, json.loads((run_dir / SUMMARY).read_text(encoding="utf-8")))


def _train_in_new_directory(cfg: Config, directory: str | Path | None) -> Path:
  """Trains in a new run directory, which is removed if the run fails before training starts."""
  wanted = Path("outputs") / time.strftime(f"%Y-%m-%d/%H-%M-%S-{cfg.name}") if directory is None else Path(directory)
  claim = claim_directory(wanted, typed=directory is not None)
  try:
    run_task(cfg, claim.path)
  except InputError:
    claim.undo()
    raise
  return claim.path


def load(run_dir: str | Path) -> "LoadedRun":
  """Loads the base and the trained adapter of a finished run, for evaluation or generation. Imports jax.

  Raises InputError if the directory does not contain a finished run.
  """
  directory = Path(run_dir).absolute()
  cfg = replace(load_config(str(directory)), task="evaluate", run=str(directory))
  loaded: LoadedRun = import_module("lora_exp.train.loaded_run").open_run(cfg)
  return loaded

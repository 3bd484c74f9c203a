"""Makes relative paths on the command line absolute, so that a run finds its files from any directory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_exp.config.schema import TOKENIZERS, Config, DataConfig, ModelConfig
from lora_exp.models.weights.locate import is_path


def with_absolute_paths(cfg: Config) -> Config:
  """Returns `cfg` with every path absolute and `~` expanded. Symbolic links are not resolved."""
  return replace(
    cfg,
    run=_absolute_or_none(cfg.run), runs=_data_path(cfg.runs), cache=absolute(cfg.cache) if cfg.cache else cfg.cache,
    prompt_file=_absolute_list(cfg.prompt_file), out=_absolute_or_none(cfg.out),
    harness_tasks=_absolute_or_none(cfg.harness_tasks),
    eval=replace(cfg.eval, metric_file=_absolute_or_none(cfg.eval.metric_file)),
    train=replace(cfg.train, resume=_absolute_or_none(cfg.train.resume)),
    model=_model(cfg.model), data=_data(cfg.data),
    pretrain_data=cfg.pretrain_data and _data(cfg.pretrain_data), retain=cfg.retain and _data(cfg.retain),
  )


def absolute(path: str) -> str:
  """`path` as an absolute path with `~` expanded."""
  try:
    return str(Path(path).expanduser().absolute())
  except RuntimeError:  # ~nobody: no such user
    return str(Path(path).absolute())


def _absolute_or_none(path: str | None) -> str | None:
  return absolute(path) if path else path


def _absolute_list(value: Any) -> Any:
  """`absolute` for a path or each path of a list; other values are unchanged."""
  if isinstance(value, list):
    return [_absolute_list(path) for path in value]
  return absolute(value) if value and isinstance(value, str) else value


def _model(model: ModelConfig) -> ModelConfig:
  weights, tokenizer = model.weights, model.tokenizer
  if weights and is_path(weights):  # not a hub id or the name of a package
    weights = absolute(weights)
  if tokenizer not in TOKENIZERS and tokenizer and Path(absolute(tokenizer)).exists():
    tokenizer = absolute(tokenizer)
  return replace(model, weights=weights, tokenizer=tokenizer)


def _data(data: DataConfig) -> DataConfig:
  return replace(data, path=_data_path(data.path), eval_path=_data_path(data.eval_path))


def _data_path(value: Any) -> Any:
  """`absolute` for a path of data or a list of paths. hub:OWNER/NAME and invalid values are unchanged."""
  if isinstance(value, list):
    return [_data_path(path) for path in value]
  return absolute(value) if value and isinstance(value, str) and not value.startswith("hub:") else value

"""Checks of data settings that are common to all sources. Each source in `data` has further checks."""

from collections.abc import Iterator
from typing import Any

from lora_exp.config.conversion import shown
from lora_exp.config.lora_checks import pattern_problems
from lora_exp.config.schema import Config, DataConfig


def sources(cfg: Config) -> dict[str, DataConfig]:
  """The data settings that this run uses, by dotted path."""
  found = {"data": cfg.data}
  if cfg.pretrain_data is not None and cfg.model.base == "pretrain":
    found["pretrain_data"] = cfg.pretrain_data
  if cfg.retain is not None:
    found["retain"] = cfg.retain
  return found


def merges(cfg: Config) -> bool:
  """Whether the task merges or converts an adapter, and compares the result on the run's data."""
  exports = cfg.format in ("merged", "gguf_merged") or cfg.export.rank is not None
  return cfg.task == "merge" or (cfg.task == "export" and exports)


def data_problems(cfg: Config) -> Iterator[str]:
  """Yields problems of the data settings of a run, one line each: 'path=value: what is allowed'."""
  for name, data in sources(cfg).items():
    for key in ("path", "eval_path"):
      yield from _path_problems(f"{name}.{key}", getattr(data, key))
    if data.teacher is not None:
      yield from _teacher(name, data)
    if cfg.model.family == "mlp":
      continue  # a row is an example
    if data.seq_len > cfg.model.max_len:
      yield f"{name}.seq_len={data.seq_len}: must be at most model.max_len={cfg.model.max_len}"
    if data.pad_in_loss and data.packing != "pad":
      yield f"{name}.pad_in_loss=true: needs {name}.packing=pad"
    if data.eval_path is None and data.eval_split is None and 0.5 < data.eval_fraction < 1:
      yield f"{name}.eval_fraction={data.eval_fraction:g}: must be at most 0.5"


def _path_problems(path: str, value: Any) -> Iterator[str]:
  """The problem of a data path that is neither a string nor a list of strings."""
  if isinstance(value, list) and value and all(isinstance(item, str) and item for item in value):
    return
  if value is not None and not isinstance(value, str):
    yield f"{path}={shown(value)}: must be a path, or a list of paths: {path}=[a.jsonl,b.jsonl]"


def _teacher(name: str, data: DataConfig) -> Iterator[str]:
  if name != "data":
    yield f"{name}.teacher: only the training data has a teacher; choose data@{name}={data.source} without one"
  else:
    assert data.teacher is not None
    yield from pattern_problems("data.teacher.targets", data.teacher.targets)

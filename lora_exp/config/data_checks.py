"""What is allowed of the data that a run reads, and of the files that it names."""

import os
from collections.abc import Iterator
from pathlib import Path

from lora_exp.config.errors import did_you_mean
from lora_exp.config.lora_checks import pattern_problems
from lora_exp.config.schema import EXAMPLES, FILE_SOURCES, Config, DataConfig


def sources(cfg: Config) -> dict[str, DataConfig]:
  """The data that this run reads, by the path of its settings."""
  found = {"data": cfg.data}
  if cfg.pretrain_data is not None and cfg.model.base == "pretrain":
    found["pretrain_data"] = cfg.pretrain_data
  if cfg.retain is not None:
    found["retain"] = cfg.retain
  return found


def merges(cfg: Config) -> bool:
  """Whether the task merges what a run trained, which reads the run's data."""
  return cfg.task == "merge" or (cfg.task == "export" and cfg.format == "merged")


def data_problems(cfg: Config) -> Iterator[str]:
  """Problems of the sources that a run reads, a line each."""
  for name, data in sources(cfg).items():
    if (cfg.model.family == "mlp") != data.numbers:
      yield _other_kind(name, data, cfg.model.family)
      continue
    if data.teacher is not None:
      yield from _teacher(cfg, name, data)
    if data.numbers:
      yield from _sizes(cfg, name, data)
      continue
    if data.seq_len > cfg.model.max_len:
      yield f"{name}.seq_len={data.seq_len}: must be at most model.max_len={cfg.model.max_len}"
    if data.pad_in_loss and data.packing != "pad":
      yield f"{name}.pad_in_loss=true: needs {name}.packing=pad"
    if data.source == "stdlib" and data.view is None:
      yield f"{name}.view=null: stdlib needs one: choose code, docs"
    if data.source == "sentences" and (len(set(data.sentences)) < 2 or not all(map(str.strip, data.sentences))):
      yield f"{name}.sentences: must be two different texts or more, none of them blank"
    if data.source in FILE_SOURCES:
      if cfg.task in ("train", "evaluate") or (name == "data" and merges(cfg)):
        yield from _paths(name, data)
    elif data.path is not None or data.eval_path is not None:
      group = "data" if name == "data" else f"data@{name}"
      yield f"{name}.path={data.path}: {data.source} reads no such file; add {group}=text or {group}=jsonl"
    if data.source == "jsonl":
      for key in ("prompt_field", "response_field"):
        if not getattr(data, key):
          yield f"{name}.{key}: must be the name of a field"


def _other_kind(name: str, data: DataConfig, family: str) -> str:
  """A source of text for a model of numbers, or the reverse."""
  group = "data" if name == "data" else f"data@{name}"
  if data.numbers:
    return f"{name}.source={data.source}: holds numbers, and model.family={family} reads text; add model=mlp"
  choices = [f"{group}={source}" for source in EXAMPLES] + [f"{group}=none"] * (name != "data")
  return f"{name}.source={data.source}: is text, and model.family=mlp reads numbers; add {' or '.join(choices)}"


def _teacher(cfg: Config, name: str, data: DataConfig) -> Iterator[str]:
  if name != "data":
    yield f"{name}.teacher: only what is learned has a teacher; choose data@{name}={data.source} without one"
  elif data.numbers:
    yield f"data.teacher: {data.source} is numbers, and a teacher says words; leave it null"
  else:
    assert data.teacher is not None
    yield from pattern_problems("data.teacher.targets", data.teacher.targets)


def _sizes(cfg: Config, name: str, data: DataConfig) -> Iterator[str]:
  if data.seq_len != 1:
    yield f"{name}.seq_len={data.seq_len}: must be 1, as an example of {data.source} is a row"
  if cfg.model.mlp is None:
    return  # told by _mlp
  for key, size in zip(("inputs", "outputs"), EXAMPLES[data.source], strict=True):
    if getattr(cfg.model.mlp, key) != size:
      yield f"model.mlp.{key}={getattr(cfg.model.mlp, key)}: must be {size} with {name}.source={data.source}"


def _paths(name: str, data: DataConfig) -> Iterator[str]:
  if not data.path:
    what = "a file of JSON lines" if data.source == "jsonl" else \
      "a text file (TinyStories, for example), documents separated by <|endoftext|>"
    yield f"{name}.path=null: give {name}.path=FILE, {what}"
  else:
    yield from file_problems(f"{name}.path", data.path)
  if data.eval_path is not None:
    yield from file_problems(f"{name}.eval_path", data.eval_path)


def file_problems(path: str, value: str) -> Iterator[str]:
  """Why the file that the setting `path` names cannot be read."""
  file = Path(value)
  if not file.exists():
    near = did_you_mean(file.name, os.listdir(file.parent)) if file.parent.is_dir() else ""
    yield f"{path}={value}: no such file{near}"
  elif not file.is_file():
    yield f"{path}={value}: is a directory; give a file"
  elif not os.access(file, os.R_OK):
    yield f"{path}={value}: cannot be read (permission denied)"

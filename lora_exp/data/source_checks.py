"""Checks of the data settings: whether the sources exist, suit the model, and can be read.

These checks need the sources or the files. `config.data_checks` has those that need neither.
"""

import re
from collections.abc import Iterator

from lora_exp.config.data_checks import merges, sources
from lora_exp.config.errors import InputError
from lora_exp.config.schema import Config, DataConfig
from lora_exp.data.sources import NumericSource, registry, source_class
from lora_exp.data.sources.file_source import FileSource
from lora_exp.data.sources.settings import make_source
from lora_exp.data.sources.source import COMMON


def source_problems(cfg: Config) -> list[str]:
  """Yields every problem of the sources of a run, one line each: 'path=value: what is allowed'. Imports no jax."""
  return [problem for name, data in sources(cfg).items() for problem in _problems(cfg, name, data)]


def _problems(cfg: Config, name: str, data: DataConfig) -> Iterator[str]:
  """Problems of the source in the group `name`: data, pretrain_data or retain."""
  try:
    cls = source_class(data.source)
  except InputError as error:
    yield _in_group(name, str(error))
    return
  numeric_model = cfg.model.family == "mlp"
  if cls.numeric != numeric_model:
    yield _other_kind(name, data, cls.numeric, cfg.model.family)
    return
  source, problems = make_source(cls, data)
  if any(not isinstance(value, str | list | type(None)) or value == [] for value in (data.path, data.eval_path)):
    return  # reported by `config.data_checks`
  problems += source.check()
  if cfg.task in ("train", "evaluate", "advise", "data") or (name == "data" and merges(cfg)):
    problems += source.check_inputs()
  yield from (_in_group(name, problem) for problem in problems)
  if isinstance(source, NumericSource):
    yield from _numeric(cfg, name, data, source)
    return
  if not isinstance(source, FileSource) and (data.path is not None or data.eval_path is not None):
    path = str(data.path or data.eval_path or "")
    choices = [f"{_group(name)}={other}" for other in file_sources(path)]
    yield f"{name}.path={data.path}: the source {data.source} does not read a file; add {' or '.join(choices)}"


def file_sources(path: str) -> list[str]:
  """The sources that read files; those whose files usually have the suffix of `path` come first."""
  names = {name: cls for name, cls in registry().items() if issubclass(cls, FileSource)}
  return sorted(names, key=lambda name: not path.endswith(names[name].suffixes))


def _in_group(name: str, problem: str) -> str:
  """Rewrites a source's message about `data.NAME` for the settings in the group `name`."""
  return re.sub(rf"(?<![\w./-])data\.(?=({'|'.join([*COMMON, 'options'])})\b)", f"{name}.", problem)


def _group(name: str) -> str:
  """The group `name` as written in overrides."""
  return "data" if name == "data" else f"data@{name}"


def _other_kind(name: str, data: DataConfig, numeric: bool, family: str) -> str:
  """The problem of a text source with a numeric model, or the reverse."""
  if numeric:
    return f"{name}.source={data.source}: is numeric, but model.family={family} reads text; add model=mlp"
  choices = [f"{_group(name)}={other}" for other, kind in registry().items() if kind.numeric]
  choices += [f"{_group(name)}=none"] * (name != "data")
  return f"{name}.source={data.source}: is text, but model.family={family} reads numbers; add {' or '.join(choices)}"


def _numeric(cfg: Config, name: str, data: DataConfig, source: NumericSource) -> Iterator[str]:
  """Problems of a numeric source: model sizes that differ, and settings that only text has."""
  if data.teacher is not None:
    yield f"{name}.teacher: {data.source} is numeric, but a teacher predicts tokens; set it to null"
  if data.seq_len != 1:
    yield f"{name}.seq_len={data.seq_len}: must be 1, because each row of {data.source} is one example"
  if cfg.model.mlp is None:
    return  # reported by `config.checks`
  for key, size in (("inputs", source.inputs), ("outputs", source.outputs)):
    if getattr(cfg.model.mlp, key) != size:
      yield f"model.mlp.{key}={getattr(cfg.model.mlp, key)}: must be {size} with {name}.source={data.source}"

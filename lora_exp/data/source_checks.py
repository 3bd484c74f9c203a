"""The checks of a command line's data: whether its sources exist, fit the model, and can be read.

These are the checks that need the sources or look at files. What needs neither is `config.data_checks`.
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
  """Every problem of the sources that a run reads, one line each: 'path=value: what is allowed'. Imports no jax."""
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
  problems += source.check()
  if cfg.task in ("train", "evaluate") or (name == "data" and merges(cfg)):
    problems += source.check_inputs()
  yield from (_in_group(name, problem) for problem in problems)
  if isinstance(source, NumericSource):
    yield from _numeric(cfg, name, data, source)
    return
  if not isinstance(source, FileSource) and (data.path is not None or data.eval_path is not None):
    path = data.path or data.eval_path or ""
    choices = [f"{_group(name)}={other}" for other in file_sources(path)]
    yield f"{name}.path={data.path}: {data.source} reads no such file; add {' or '.join(choices)}"


def file_sources(path: str) -> list[str]:
  """The sources that read files, those first whose files usually end as `path` does."""
  names = {name: cls for name, cls in registry().items() if issubclass(cls, FileSource)}
  return sorted(names, key=lambda name: not path.endswith(names[name].suffixes))


def _in_group(name: str, problem: str) -> str:
  """A problem of a source, whose messages call its settings `data.NAME`, for the settings in the group `name`."""
  return re.sub(rf"(?<![\w./-])data\.(?=({'|'.join([*COMMON, 'options'])})\b)", f"{name}.", problem)


def _group(name: str) -> str:
  """The group `name` as it is typed."""
  return "data" if name == "data" else f"data@{name}"


def _other_kind(name: str, data: DataConfig, numeric: bool, family: str) -> str:
  """The problem of a source of text for a model of numbers, or the reverse."""
  if numeric:
    return f"{name}.source={data.source}: holds numbers, and model.family={family} reads text; add model=mlp"
  choices = [f"{_group(name)}={other}" for other, kind in registry().items() if kind.numeric]
  choices += [f"{_group(name)}=none"] * (name != "data")
  return f"{name}.source={data.source}: is text, and model.family={family} reads numbers; add {' or '.join(choices)}"


def _numeric(cfg: Config, name: str, data: DataConfig, source: NumericSource) -> Iterator[str]:
  """Problems of a source of numbers with the model's sizes, and with what only text has."""
  if data.teacher is not None:
    yield f"{name}.teacher: {data.source} is numbers, and a teacher predicts tokens; leave it null"
  if data.seq_len != 1:
    yield f"{name}.seq_len={data.seq_len}: must be 1, as an example of {data.source} is a row"
  if cfg.model.mlp is None:
    return  # `config.checks` says so
  for key, size in (("inputs", source.inputs), ("outputs", source.outputs)):
    if getattr(cfg.model.mlp, key) != size:
      yield f"model.mlp.{key}={getattr(cfg.model.mlp, key)}: must be {size} with {name}.source={data.source}"

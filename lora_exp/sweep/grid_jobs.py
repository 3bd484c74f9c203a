"""The jobs of a multirun: a cross product of lists, lists that go together, and single points beside them; none twice.

    hydra:
      sweeper:
        params: {lora.rank: "1,2,4", train.seed: "0,1,2"}      every rank with every seed
        zip: [{lora.rank: "1,2,4", lora.alpha: "2,4,8"}]       the lists of one entry go together
        extra: [{lora: frozen}, {lora: full, train.seed: "0,1,2"}]   points beside the product

What is typed wins over what the file says: a list replaces the file's list, also in `extra` where that has the key; one
value is given to every job, but for the keys that an extra point sets itself.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from lora_exp.config.errors import InputError
from lora_exp.config.old_names import rename_override

Parse = Callable[[list[str]], Sequence[Override]]  # texts `key=value` to overrides
Dimension = list[tuple[str, ...]]  # what goes together, for each of its values


def jobs(sweeper: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> list[list[str]]:
  """The overrides of each job, in order; `sweeper` is the node hydra.sweeper. Raises InputError for unequal lists."""
  last = {o.get_key_element(): o for o in typed}  # of a key that is typed twice
  lists = {key: o for key, o in last.items() if o.is_sweep_override()}
  single = {key: one(o) for key, o in last.items() if not o.is_sweep_override()}
  found = _product(sweeper, lists, single, parse)
  for point in sweeper.get("extra") or []:
    found += points(point, lists, single, parse)
  unique: dict[frozenset[str], list[str]] = {}
  for job in found:
    unique.setdefault(frozenset(job), job)
  return list(unique.values())


def _product(sweeper: Mapping, lists: Mapping[str, Override], single: Mapping[str, str], parse: Parse) -> list:
  dimensions: list[Dimension] = []
  for group in sweeper.get("zip") or []:
    dimensions += _zipped({k: v for k, v in group.items() if k not in lists and k not in single}, parse)
  params = {o.get_key_element(): o for o in parse(texts(sweeper.get("params") or {}))}
  for key, override in {**params, **lists}.items():
    if key not in single:
      dimensions.append([(text,) for text in values(override)])
  given: Dimension = [tuple(single.values())]
  return [list(itertools.chain(*choice)) for choice in itertools.product(given, *dimensions)]


def _zipped(group: Mapping[str, Any], parse: Parse) -> Iterator[Dimension]:
  if not group:
    return
  columns = [values(override) for override in parse(texts(group))]
  if len({len(column) for column in columns}) > 1:
    sizes = ", ".join(f"{key} has {len(column)}" for key, column in zip(group, columns, strict=True))
    raise InputError(f"hydra.sweeper.zip: lists that go together are of one length; {sizes}")
  yield list(zip(*columns, strict=True))


def points(point: Mapping[str, Any], lists: Mapping[str, Override], single: Mapping[str, str], parse: Parse) -> list:
  """The jobs of an entry of `extra`, with the lists and single values that were typed."""
  own = {o.get_key_element(): o for o in parse(texts(point))}
  replaced = {key: lists[key] if key in lists and o.is_sweep_override() else o for key, o in own.items()}
  fixed = [[text] for key, text in single.items() if key not in own]
  return [list(job) for job in itertools.product(*fixed, *(values(o) for o in replaced.values()))]


def texts(node: Mapping[str, Any]) -> list[str]:
  """The overrides that a mapping in a sweep's file stands for."""
  return [rename_override(f"{key}={'null' if value is None else value}") for key, value in node.items()]


def values(override: Override) -> list[str]:
  """An override for each value of a list. Raises InputError for an interval."""
  key = override.get_key_element()
  if not override.is_sweep_override():
    return [one(override)]
  if not override.is_discrete_sweep():
    raise InputError(f"{override.input_line}: this sweeper takes lists, as {key}=1,2,3; an interval is searched by "
                     "hydra/sweeper=study")
  return [f"{key}={value}" for value in override.sweep_string_iterator()]


def one(override: Override) -> str:
  """An override of one value, as text."""
  if override.is_delete() or override.is_hydra_override():
    return str(override.input_line)
  return f"{override.get_key_element()}={override.get_value_element_as_str()}"

"""The jobs of a grid sweep: a product of lists, zipped lists, and additional single points.

    hydra:
      sweeper:
        params: {lora.rank: "1,2,4", seed: "0,1,2"}            every rank with every seed
        zip: [{lora.rank: "1,2,4", lora.alpha: "2,4,8"}]       the lists of one entry advance together
        extra: [{lora: frozen}, {lora: full, seed: "0,1,2"}]         points outside the product

Overrides on the command line have priority over the sweep's file. A list replaces the file's list, also in the points
of `extra` that have the key. A single value applies to every job, except to points of `extra` that set the key. A
single seed applies to those too.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from lora_exp.config.errors import InputError
from lora_exp.config.old_names import rename_override
from lora_exp.config.setting_names import opened

SEEDS = ("seed", "train.seed", "data.seed", "model.seed")  # settings that repeat a trial and do not change what it is
MOST_JOBS = 10_000
FEWER = f"give fewer values, for at most {MOST_JOBS:,} jobs, or search them with hydra/sweeper=study"
Parse = Callable[[list[str]], Sequence[Override]]  # overrides as text -> parsed
Dimension = list[tuple[str, ...]]  # one dimension of the product: the overrides at each position


def grid_jobs(sweeper: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> list[list[str]]:
  """The overrides of each job, in order, without duplicates. `sweeper` is the node hydra.sweeper.

  Raises InputError for zipped lists of different lengths, for intervals, and for more than MOST_JOBS jobs.
  """
  lists, single = typed_values(typed)
  jobs = _product(sweeper, lists, single, parse)
  for point in sweeper.get("extra") or []:
    jobs += point_jobs(point, lists, single, parse)
  unique: dict[frozenset[str], list[str]] = {}
  for job in jobs:
    unique.setdefault(frozenset(text.lstrip("+") for text in job), job)
  return list(unique.values())


def override_key(override: Override) -> str:
  """The setting or group that an override sets, without the + or ++ in front of it."""
  return override.get_key_element().lstrip("+")


def typed_values(typed: Sequence[Override]) -> tuple[dict[str, Override], dict[str, str]]:
  """The overrides of the command line by key: those with lists, and the others as text."""
  by_key = {override_key(override): override for override in typed}  # the last override of a key applies
  lists = {key: override for key, override in by_key.items() if override.is_sweep_override()}
  single = {key: single_override(override) for key, override in by_key.items() if not override.is_sweep_override()}
  return lists, single


def _product(
  sweeper: Mapping[str, Any], lists: Mapping[str, Override], single: Mapping[str, str], parse: Parse
) -> list[list[str]]:
  """The jobs of `params` and `zip`, combined with the lists and single values from the command line."""
  dimensions: list[Dimension] = [[tuple(single.values())]]
  for group in sweeper.get("zip") or []:
    columns = {key: value for key, value in group.items() if key not in lists and key not in single}
    if columns:
      dimensions.append(_zipped(columns, parse))
  params = {override_key(override): override for override in parse(override_texts(sweeper.get("params") or {}))}
  for key, override in {**params, **lists}.items():
    if key not in single:
      dimensions.append([(text,) for text in expanded(override)])
  count = math.prod(map(len, dimensions))
  if count > MOST_JOBS:
    raise InputError(f"the sweep has {count:,} jobs; {FEWER}")
  return [list(itertools.chain(*choice)) for choice in itertools.product(*dimensions)]


def _zipped(group: Mapping[str, Any], parse: Parse) -> Dimension:
  """One dimension for lists that advance together."""
  columns = [expanded(override) for override in parse(override_texts(group))]
  if len({len(column) for column in columns}) > 1:
    sizes = ", ".join(f"{key} has {len(column)}" for key, column in zip(group, columns, strict=True))
    raise InputError(f"hydra.sweeper.zip: zipped lists must have the same length; {sizes}")
  return list(zip(*columns, strict=True))


def point_jobs(
  point: Mapping[str, Any], lists: Mapping[str, Override], single: Mapping[str, str], parse: Parse
) -> list[list[str]]:
  """The jobs of an entry of `extra`, combined with the lists and single values from the command line."""
  overrides = {override_key(override): override for override in parse(override_texts(point))}
  dimensions = [[text] for key, text in single.items() if key not in overrides]
  for key, override in overrides.items():
    if key in SEEDS and key in single:
      dimensions.append([single[key]])
    else:
      replaced = override.is_sweep_override() and key in lists
      dimensions.append(expanded(lists[key] if replaced else override))
  return [list(job) for job in itertools.product(*dimensions)]


def override_texts(node: Mapping[str, Any]) -> list[str]:
  """The mapping of a sweep's file as overrides, with the current names of settings."""
  texts = [f"{key}={'null' if value is None else value}" for key, value in node.items()]
  return [opened(rename_override(text)) for text in texts]


def expanded(override: Override) -> list[str]:
  """One override for each value of a list. Raises InputError for an interval."""
  key = override.get_key_element()
  if not override.is_sweep_override():
    return [single_override(override)]
  if not override.is_discrete_sweep():
    raise InputError(f"{override.input_line}: this sweeper takes lists such as {key}=1,2,3; to search an interval, use "
                     "hydra/sweeper=study")
  values = list(itertools.islice(override.sweep_string_iterator(), MOST_JOBS + 1))
  if len(values) > MOST_JOBS:
    raise InputError(f"{override.input_line}: has more than {MOST_JOBS:,} values; {FEWER}")
  return [f"{key}={value}" for value in values]


def single_override(override: Override) -> str:
  """An override with a single value as text."""
  if override.is_delete() or override.is_hydra_override():
    return str(override.input_line)
  return f"{override.get_key_element()}={override.get_value_element_as_str()}"

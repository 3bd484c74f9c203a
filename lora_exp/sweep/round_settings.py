"""Reads hydra.sweeper of a sweep in rounds, and checks it.

    hydra:
      sweeper:
        params: {lora.rank: "1,2,4", seed: "0,1,2"}      the settings, and the seeds that score each of them
        extra: [{lora: full, seed: "0,1,2"}]             additional settings
               [{lora: frozen}]                          a point without seeds is trained once and not tuned
        tune: {setting: optim.lr, factors: [0.5, 1, 2]}  chosen for each setting, as a multiple of its default

`params`, `zip` and `extra` are those of a grid, with the same priority of the command line.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.types import Override

from lora_exp.config.conversion import shown
from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import Config
from lora_exp.config.setting_names import is_setting, suggestion
from lora_exp.sweep.grid_jobs import SEEDS, Parse, grid_jobs, override_texts, point_jobs, typed_values
from lora_exp.sweep.round_plan import ComparedSetting, RoundPlan, Tuning, labels

KEYS = ("params", "zip", "extra", "tune", "repeat_failed")  # of hydra.sweeper
TUNE_KEYS = ("setting", "factors", "seed", "extend", "neighbour")


def read_rounds(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> RoundPlan:
  """The plan of the node hydra.sweeper and the overrides `typed`. Raises InputError that lists every problem."""
  tune = node.get("tune") or {}
  problems = [*_unknown_keys(node, KEYS, ""), *_unknown_keys(tune, TUNE_KEYS, "tune.")]
  settings: list[ComparedSetting] = []
  try:
    settings = _settings(node, typed, parse)
  except InputError as error:
    problems += error.problems
  if tune.get("setting") is not None:
    problems += _tuning_problems(tune, typed, settings)
  if problems:
    raise InputError(problems)
  return RoundPlan(settings, _tuning(tune), bool(node.get("repeat_failed")))


def _settings(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> list[ComparedSetting]:
  """The settings in the order of the grid. Seeds repeat a setting, but not a point of `extra` without seeds."""
  jobs = [(job, True) for job in grid_jobs({**node, "extra": None}, typed, parse)]
  lists, single = typed_values(typed)
  for point in node.get("extra") or []:
    repeated = any(_key(text) in SEEDS for text in override_texts(point))
    jobs += [(job, repeated) for job in point_jobs(point, lists, single, parse)]
  seeds: dict[tuple[tuple[str, ...], bool], list[list[str]]] = {}
  for job, repeated in jobs:
    own = [text for text in job if repeated and _key(text) in SEEDS]
    seeds.setdefault((tuple(text for text in job if text not in own), repeated), []).append(own)
  names = labels([[text for text in overrides if _key(text) not in SEEDS] for overrides, _ in seeds])
  return [ComparedSetting(list(overrides), found if repeated else [], name)
          for ((overrides, repeated), found), name in zip(seeds.items(), names, strict=True)]


def _key(text: str) -> str:
  return text.partition("=")[0].lstrip("+~")


def _unknown_keys(node: Mapping[str, Any], known: Sequence[str], prefix: str) -> Iterator[str]:
  for key in node:
    if key not in known and key != "_target_":
      yield f"hydra.sweeper.{prefix}{key}: no such setting{did_you_mean(str(key), known)}"


def _tuning(tune: Mapping[str, Any]) -> Tuning | None:
  if tune.get("setting") is None:
    return None
  factors = sorted(float(factor) for factor in tune["factors"])
  return Tuning(tune["setting"], factors, tune["seed"], tune["extend"], tune["neighbour"])


def _tuning_problems(
  tune: Mapping[str, Any], typed: Sequence[Override], settings: Sequence[ComparedSetting]
) -> Iterator[str]:
  """Problems in hydra.sweeper.tune, whose setting is not null."""
  name, factors = tune["setting"], tune.get("factors")
  if not isinstance(name, str) or not is_setting(name) or "." not in name:
    yield f"hydra.sweeper.tune.setting={name}: no such setting{suggestion(str(name))}"
  elif any(o.get_key_element() == name and o.is_sweep_override() for o in typed):
    yield (f"{name}: is tuned for each setting; give factors such as hydra.sweeper.tune.factors=[0.5,1,2], "
           f"or compare its values without tuning: hydra.sweeper.tune.setting=null")
  if not (isinstance(factors, Sequence) and factors and all(_is_positive(f) for f in factors)
          and len(set(factors)) == len(factors)):
    yield f"hydra.sweeper.tune.factors={factors}: give a list of different positive numbers, such as [0.5,1,2]"
  for key in ("seed", "extend"):
    if not _is_whole(tune.get(key)):
      yield f"hydra.sweeper.tune.{key}={tune.get(key)}: give an integer of at least 0"
  if not isinstance(tune.get("neighbour"), bool):
    yield f"hydra.sweeper.tune.neighbour={tune.get('neighbour')}: give true or false"
  scoring = {text.partition("=")[2] for setting in settings for seed in setting.seeds for text in seed}
  if str(tune.get("seed")) in scoring:
    yield (f"hydra.sweeper.tune.seed={tune['seed']}: is one of the seeds that score the settings; choose another, so "
           "that choosing is not scoring")


def round_run_problems(plan: RoundPlan, cfg: Config) -> Iterator[str]:
  """Problems of a plan with the config `cfg` of one of its runs."""
  if plan.tuning is None:
    return
  value: Any = cfg
  for name in plan.tuning.setting.split("."):
    value = getattr(value, name)
  if not _is_positive(value):
    yield (f"hydra.sweeper.tune.setting={plan.tuning.setting}: needs a positive number as default, and it is "
           f"{shown(value)}; set it, for example {plan.tuning.setting}=1")


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0

"""Reads hydra.sweeper of a sweep in rounds, and checks it.

    hydra:
      sweeper:
        params: {lora.rank: "1,2,4", seed: "0,1,2"}      the settings, and the seeds that score each of them
        extra: [{lora: full, seed: "0,1,2"}]             additional settings
               [{lora: frozen}]                          a point without seeds is trained once and not tuned
        tune: {setting: optim.lr, factors: [0.5, 1, 2]}  chosen for each setting, as a multiple of its default

        decide: {looks: [3, 4, 5, 6, 8, 10]}             seeds are added until the answer is known
        budget: {steps: 20000}                           or until this is spent

`params`, `zip` and `extra` are those of a grid, with the same priority of the command line.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.types import Override

from lora_exp.config.conversion import shown
from lora_exp.config.errors import InputError, did_you_mean
from lora_exp.config.schema import Config
from lora_exp.config.setting_names import is_setting, suggestion
from lora_exp.sweep.packs.grid_jobs import (
  SEEDS,
  Parse,
  grid_jobs,
  override_key,
  override_texts,
  point_jobs,
  typed_values,
)
from lora_exp.sweep.rounds.round_plan import Budget, ComparedSetting, Decision, RoundPlan, Tuning, labels

FEWEST_SEEDS, MOST_SEEDS = 3, 10_000  # with fewer no verdict is reached; more are a mistake
KEYS = ("params", "zip", "extra", "tune", "decide", "budget", "repeat_failed")  # of hydra.sweeper
DECIDE_KEYS = ("looks", "level", "early")
BUDGET_KEYS = ("trials", "steps", "minutes")
TUNE_KEYS = ("setting", "factors", "seed", "extend", "neighbour")


def read_rounds(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> RoundPlan:
  """The plan of the node hydra.sweeper and the overrides `typed`. Raises InputError that lists every problem."""
  tune, decide, budget = (node.get(name) or {} for name in ("tune", "decide", "budget"))
  problems = [*_unknown_keys(node, KEYS, ""), *_unknown_keys(tune, TUNE_KEYS, "tune."),
              *_unknown_keys(decide, DECIDE_KEYS, "decide."), *_unknown_keys(budget, BUDGET_KEYS, "budget.")]
  settings: list[ComparedSetting] = []
  try:
    settings = _settings(node, typed, parse)
  except InputError as error:
    problems += error.problems
  if tune.get("setting") is not None:
    problems += _tuning_problems(tune, typed, settings)
  if decide.get("looks") is not None:
    problems += _decision_problems(decide, tune, settings)
  problems += _budget_problems(budget)
  if problems:
    raise InputError(problems)
  decision = None if decide.get("looks") is None else Decision(
    list(decide["looks"]), float(decide["level"]), decide.get("early")
  )
  if decision is not None:
    settings = [_with_seeds(setting, decision.looks, tune.get("seed")) for setting in settings]
  return RoundPlan(settings, _tuning(tune), bool(node.get("repeat_failed")), decision, Budget(**budget))


def _settings(node: Mapping[str, Any], typed: Sequence[Override], parse: Parse) -> list[ComparedSetting]:
  """The settings in the order of the grid. Seeds repeat a setting, but not a point of `extra` without seeds."""
  jobs = [(job, True, True) for job in grid_jobs({**node, "extra": None}, typed, parse)]
  lists, single = typed_values(typed)
  for point in node.get("extra") or []:
    repeated = any(_key(text) in SEEDS for text in override_texts(point))
    jobs += [(job, repeated, False) for job in point_jobs(point, lists, single, parse)]
  seeds: dict[tuple[tuple[str, ...], bool, bool], list[list[str]]] = {}
  for job, repeated, compared in jobs:
    own = [text for text in job if repeated and _key(text) in SEEDS]
    seeds.setdefault((tuple(text for text in job if text not in own), repeated, compared), []).append(own)
  names = labels([[text for text in overrides if _key(text) not in SEEDS] for overrides, _, _ in seeds])
  return [ComparedSetting(list(overrides), found if repeated else [], name, compared)
          for ((overrides, repeated, compared), found), name in zip(seeds.items(), names, strict=True)]


def _with_seeds(setting: ComparedSetting, looks: Sequence[int], tuning_seed: int | None) -> ComparedSetting:
  """The setting with as many seeds as the last look has: those given, then further whole numbers.

  A point of `extra` keeps its seeds.
  """
  if not setting.compared:
    return setting
  key = _key(setting.seeds[0][0])
  numbers = [int(text.partition("=")[2]) for [text] in setting.seeds][: looks[-1]]
  further = (n for n in itertools.count(max(numbers) + 1) if n != tuning_seed)
  numbers += itertools.islice(further, looks[-1] - len(numbers))
  return replace(setting, seeds=[[f"{key}={n}"] for n in numbers])


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
  elif any(override_key(o) == name and o.is_sweep_override() for o in typed):
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
    yield (f"hydra.sweeper.tune.seed={tune['seed']}: is one of the seeds that score the settings; choose another "
           "for tuning")


def _decision_problems(
  decide: Mapping[str, Any], tune: Mapping[str, Any], settings: Sequence[ComparedSetting]
) -> Iterator[str]:
  """What is wrong in hydra.sweeper.decide, whose looks are not null."""
  looks, level = decide["looks"], decide.get("level")
  if not (isinstance(looks, Sequence) and looks and all(_is_whole(n) for n in looks)
          and looks[0] >= FEWEST_SEEDS and looks[-1] <= MOST_SEEDS and sorted(set(looks)) == list(looks)):
    yield (f"hydra.sweeper.decide.looks={shown(looks)}: give ascending numbers of seeds from {FEWEST_SEEDS} to "
           f"{MOST_SEEDS:,}, such as [3,5,7,10]")
  if not (isinstance(level, int | float) and _is_positive(level) and level < 1):
    yield f"hydra.sweeper.decide.level={level}: give the probability of a wrong claim, between 0 and 1"
  if not (decide.get("early") is None or (_is_positive(decide["early"]) and decide["early"] < 1)):
    yield f"hydra.sweeper.decide.early={decide['early']}: give a share of the training such as 0.5, or null"
  if tune.get("setting") is not None and tune.get("neighbour") is True:
    yield "hydra.sweeper.tune.neighbour=True: with hydra.sweeper.decide one value of each setting is scored; give false"
  if sum(setting.compared for setting in settings) < 2:
    yield "hydra.sweeper.params: only one setting, so nothing to compare; give a list, such as lora.rank=1,2,4"
  repetitions = [seed for setting in settings if setting.compared for seed in setting.seeds]
  if not all(len(seed) == 1 and seed[0].partition("=")[2].isdecimal() for seed in repetitions):
    yield "hydra.sweeper.params: seeds are added to a list of whole numbers; give one, such as seed=0,1,2"


def _budget_problems(budget: Mapping[str, Any]) -> Iterator[str]:
  for key in BUDGET_KEYS:
    value = budget.get(key)
    if value is not None and not (_is_positive(value) and (key == "minutes" or isinstance(value, int))):
      yield f"hydra.sweeper.budget.{key}={value}: give a positive {'' if key == 'minutes' else 'whole '}number, or null"


def round_run_problems(plan: RoundPlan, cfg: Config) -> Iterator[str]:
  """Problems of a plan with the config `cfg` of one of its runs."""
  if plan.tuning is None:
    return
  value: Any = cfg
  for name in plan.tuning.setting.split("."):
    value = getattr(value, name)
  if not _is_positive(value):
    yield (f"hydra.sweeper.tune.setting={plan.tuning.setting}: its default must be a positive number, but it is "
           f"{shown(value)}; set it, for example {plan.tuning.setting}=1")


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_positive(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
